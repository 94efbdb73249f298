"""Whole trainings as numbers and words: what `end_to_end` measured, scaled to all images and epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import results, tables
from .suite import Row
from .timing import Percentiles, percentiles

# The level of these rows, which are of no workload, and the folder inside that of results.
LEVEL, FOLDER = "whole_training", "trainings"
LECTURE, FASTCONV = "the lecture's program", "fastconv train"


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The provenance and the rows of a file; `results.read` says what it raises."""
    return results.read(path, [LEVEL])


def scaled(row: Row) -> dict[str, dict[str, float]]:
    """The seconds that a program would take for the whole training, by its parts and by what these do."""
    return {
        part: {activity: row["scale"][part] * seconds for activity, seconds in activities.items()}
        for part, activities in row["seconds"].items()
    }


def totals(rows: list[Row], contender: str) -> list[float]:
    """The seconds of a whole training in each round."""
    return [
        sum(sum(activities.values()) for activities in scaled(row).values())
        for row in rows
        if row["contender"] == contender
    ]


def ratio(rows: list[Row]) -> Percentiles:
    """How many times as long the lecture's program takes: percentiles of each round's ratio."""
    pairs = zip(totals(rows, LECTURE), totals(rows, FASTCONV), strict=True)
    return percentiles([theirs / ours for theirs, ours in pairs])


def median(values: list[float]) -> str:
    middle = percentiles(values).p50
    return f"{middle:.2f}" if middle < 10 else f"{middle:,.0f}"


def table(rows: list[Row]) -> str:
    """The seconds of each program by its parts, how they were scaled, and how many times as fast ours is."""
    columns = list(next(iter(rows[0]["seconds"].values())))
    lines = []
    for name in (LECTURE, FASTCONV):
        runs = [scaled(row) for row in rows if row["contender"] == name]
        for part in runs[0]:
            cells = [median([run[part][c] for run in runs]) if c in runs[0][part] else "" for c in columns]
            lines.append([f"{name}: {part}", *cells, median([sum(run[part].values()) for run in runs])])
        lines.append([f"**{name}**", *[""] * len(columns), f"**{median(totals(rows, name))}**"])
    low, middle, high = ratio(rows)
    words = f"Ours is {middle:.1f} times as fast ({low:.1f} - {high:.1f}). Times are {how_scaled(rows)}."
    return f"{tables.table(['seconds', *columns, 'together'], lines)}\n\n{words}"


def headline(about: dict[str, Any], rows: list[Row]) -> str:
    """One sentence: both programs' times and their ratio, on which machine, and how they were scaled."""
    ours, theirs = median(totals(rows, FASTCONV)), median(totals(rows, LECTURE))
    place = about["device"] if about["driver"] else f"{about['device']}, {about['threads']} threads"
    return (
        f"The lecture's training with all its evaluations takes **{ours} s with `{FASTCONV}` instead of "
        f"{theirs} s with {LECTURE}: {ratio(rows).p50:.1f} times as fast** ({place}; {how_scaled(rows)})."
    )


def how_scaled(rows: list[Row]) -> str:
    """What the times of the whole training are scaled from."""
    ours = next(row for row in rows if row["contender"] == FASTCONV)
    (used, validated), (whole, _) = ours["images"], ours["of"]
    images = f"{used:,} training and {validated:,} validation images" if used < whole else "all images"
    return f"scaled from {images}, {LECTURE} from one of {ours['epochs']} epochs"
