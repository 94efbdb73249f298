"""Results as pictures: how much faster each contender is, and how time grows with the batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastconv.extras import import_extra
from fastconv.files import write_atomically

from . import tables
from .contenders import BASELINE, CONTENDERS
from .suite import Row
from .workloads import LECTURE, ConvNextBlock

# One colour for each contender in every picture: greys for PyTorch's, warm ones for ours.
COLOURS = dict(
    zip(
        (contender.name for contender in CONTENDERS),
        ("#222222", "#777777", "#3b6ea5", "#6fa3d2", "#a9cbe8", "#7a6bb5", "#d1495b", "#edae49", "#c2571a"),
        strict=True,
    )
)
# The key of a PNG's text that holds the digest of the rows it was drawn from.
SOURCE = "Source"


def write_all(rows: list[Row], results: Path) -> list[Path]:
    """Draw what can be drawn beside the file of results; return the pictures.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    written = []
    for suffix, picture in PICTURES.items():
        if chosen := picture.choose(rows):
            path = results.with_name(f"{results.stem}-{suffix}.png")
            write_atomically(path, partial(picture.draw, chosen))
            written.append(path)
    return written


def digest(rows: list[Row]) -> str:
    """A hash of the rows that a picture shows."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def lecture_batch(rows: list[Row]) -> list[Row]:
    """The right rows at the lecture's first stage, of the batch and the dtype of the first workload."""
    return [
        row
        for row in rows
        if "speedup" in row
        and row["right"]
        and (row["images"], row["dtype"]) == (rows[0]["images"], rows[0]["dtype"])
        and (row["channels"], row["side"]) == LECTURE[0]
    ]


def growing(rows: list[Row]) -> list[Row]:
    """The rows of one block, forward and backward, if there are several batch sizes."""
    found = [
        row
        for row in rows
        if (row["level"], row["direction"], row["channels"], row["side"])
        == (ConvNextBlock.level, "both", *LECTURE[0])
        and "failed" not in row
        and row["dtype"] == rows[0]["dtype"]
    ]
    return found if len({row["images"] for row in found}) > 2 else []


def draw_speedups(rows: list[Row], file: BinaryIO) -> None:
    """Bars, with a line from the 20th to the 80th percentile of the rounds."""
    labels = list(dict.fromkeys(label(row) for row in rows))
    names = [name for name in COLOURS if name != BASELINE and any(row["contender"] == name for row in rows)]
    by_place = {(label(row), row["contender"]): row["speedup"] for row in rows}
    figure: Any = import_extra("matplotlib.figure").Figure(
        figsize=(8, 0.6 + 0.22 * len(labels) * (len(names) + 1)), layout="constrained"
    )
    axes = figure.subplots()
    for k, name in enumerate(names):
        places = [i * (len(names) + 1) + k for i, text in enumerate(labels) if (text, name) in by_place]
        spreads = [by_place[text, name] for text in labels if (text, name) in by_place]
        middles = [middle for _, middle, _ in spreads]
        errors = [[m - low for low, m, _ in spreads], [high - m for _, m, high in spreads]]
        axes.barh(places, middles, xerr=errors, height=0.9, color=COLOURS[name], label=name)
    axes.axvline(1, color=COLOURS[BASELINE], linewidth=1)
    axes.set_yticks([i * (len(names) + 1) + (len(names) - 1) / 2 for i in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"times as fast as eager PyTorch, batch {rows[0]['images']}, {rows[0]['dtype']}")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(figure, rows, file)


def label(row: Row) -> str:
    return tables.task(row).replace("_", " ").replace(", ", ",\n")


def draw_batches(rows: list[Row], file: BinaryIO) -> None:
    """Milliseconds against the batch, both logarithmic, with the floor below."""
    figure: Any = import_extra("matplotlib.figure").Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        own = sorted((row for row in rows if row["contender"] == name), key=lambda row: row["images"])
        if own:
            images = [row["images"] for row in own]
            low, middle, high = zip(*(row["ms"] for row in own), strict=True)
            axes.plot(images, middle, marker="o", markersize=4, color=colour, label=name)
            axes.fill_between(images, low, high, color=colour, alpha=0.2, linewidth=0)
    floors = sorted({(row["images"], row["floor_ms"]) for row in rows})
    axes.plot(*zip(*floors, strict=True), color="black", linestyle=":", label="floor of memory and arithmetic")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([images for images, _ in floors], [str(images) for images, _ in floors])
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("milliseconds")
    first = rows[0]
    axes.set_title(
        f"ConvNextBlock, {first['channels']} channels, {first['side']} x {first['side']}, "
        f"forward and backward, {first['dtype']}",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save(figure, rows, file)


def save(figure: Any, rows: list[Row], file: BinaryIO) -> None:
    figure.savefig(file, format="png", dpi=120, metadata={SOURCE: digest(rows)})


class Picture(NamedTuple):
    """What a picture is called in words, which rows it shows, and the function that draws them."""

    title: str
    choose: Callable[[list[Row]], list[Row]]
    draw: Callable[[list[Row], BinaryIO], None]


# By the ending of the file's name.
PICTURES = {
    "speedups": Picture("Speed-ups over eager PyTorch", lecture_batch, draw_speedups),
    "batches": Picture("Time of a block against the batch", growing, draw_batches),
}
