"""A comparison as a table on the console, in Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastconv.console import console as plain_console
from fastconv.training.comparison import lecture
from fastconv.training.comparison.reading import Run
from fastconv.training.comparison.rows import Mean, Row
from fastconv.training.inputs import printable
from fastconv.training.recipe import Recipe
from fastconv.training.summary import multiplications

HEADER = ("", "parameters", "mult-adds", "seconds", "validation, %", "test, %", "seeds")


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the lines below HEADER: the rows and, beside those on CIFAR-10, the lecture's."""
    lines = [
        [
            row.name,
            f"{row.first.parameters:,}",
            millions(row.first.multiplications),
            seconds(row.seconds.value),
            percent(row.validation),
            percent(row.test),
            str(len(row.runs)),
        ]
        for row in rows
    ]
    if has_lecture(rows):
        accuracy = percent(Mean(lecture.VALIDATION_ACCURACY, None))
        products = millions(multiplications(Recipe(), (3, 32, 32), 10))
        lines.append([lecture.NAME, f"{lecture.PARAMETERS:,}", products, str(lecture.SECONDS), accuracy, "", "1"])
    return lines


def has_lecture(rows: Sequence[Row]) -> bool:
    """Whether the lecture's result belongs beside them: some were trained on all of CIFAR-10, as it was."""
    return any(row.first.is_cifar10 and row.first.recipe.limit is None for row in rows)


def percent(mean: Mean | None) -> str:
    if mean is None:
        return ""
    deviation = "" if mean.deviation is None else f" ± {100 * mean.deviation:.2f}"
    return f"{100 * mean.value:.2f}{deviation}"


def millions(count: int) -> str:
    return f"{count / 1e6:#.3g}".rstrip(".") + " M"


def seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def notes(rows: Sequence[Row]) -> list[str]:
    """Return what the table does not say: what its columns are, and where the runs ran."""
    places = list(dict.fromkeys(_place(row.first) for row in rows))
    found = [
        "Mult-adds are of one image's forward; seconds are of training, without evaluations; accuracies are means "
        "over seeds, with the standard deviation of the sample.",
        *(f"Trained on {place}." for place in places),
    ]
    if has_lecture(rows):
        found.append(
            f"{lecture.NAME.capitalize()}: its own program on its own GPU, evaluations included; the original "
            "CIFAR-10."
        )
    return found


def _place(run: Run) -> str:
    environment = run.environment
    threads = f", threads: {environment.threads}" if environment.device == "cpu" else ""
    processes = f", processes: {environment.processes}" if environment.processes > 1 else ""
    return f"{environment.device}{threads}{processes}; with {run.train_images:,} images of {run.data}"


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table and its notes."""
    if not console.is_terminal:
        # A file or a pipe has no width: nothing is wrapped or cut.
        console = plain_console(file=console.file, width=200)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in HEADER:
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for line in cells(rows):
        table.add_row(*line)
    console.print(table)
    for note in notes(rows):
        console.print(note, soft_wrap=True)


def markdown(rows: Sequence[Row]) -> str:
    """Return the table in Markdown, names to the left and numbers to the right, and the notes below it."""
    rule = ["---:" if name else "---" for name in HEADER]
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (HEADER, rule, *cells(rows))]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join(table) + "\n\n" + "\n\n".join(notes(rows)) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Return a line for each run, with all that a comparison knows of it. Accuracies are in [0, 1]."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(record(rows[0], rows[0].first)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerows(record(row, run) for run in row.runs)
    return file.getvalue()


def record(row: Row, run: Run) -> dict[str, Any]:
    last = run.history[-1] if run.history else {}
    metrics = [f"{name}_{quantity}" for name in ("train", "validation") for quantity in ("loss", "accuracy")]
    return {
        "row": row.name,
        "run": printable(str(run.path.parent)),
        "finished": run.test is not None,
        "epochs_done": run.epoch,
        "parameters": run.parameters,
        "mult_adds": run.multiplications,
        "training_seconds": run.training_seconds,
        "evaluation_seconds": run.evaluation_seconds,
        **{name: last.get(name) for name in metrics},
        **{name: (run.test or {}).get(name) for name in ("test_loss", "test_accuracy")},
        **asdict(run.recipe),
        "device": run.environment.device,
        "backend": run.environment.backend,
        "threads": run.environment.threads,
        "processes": run.environment.processes,
        "torch": run.environment.versions.get("torch"),
        "data": run.data,
        "data_checksum": run.data_checksum,
        "train_images": run.train_images,
    }
