"""The README's tables of accuracy, from the CSV files of `fastconv sweep` and `fastconv compare`.

Those that the README shows are kept in bench/results/accuracies/, with a picture of each comparison.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from fastconv.training.comparison import lecture
from fastconv.training.comparison.rows import mean
from fastconv.training.comparison.tables import millions, percent, seconds

from ..tables import table

Lines = list[dict[str, str]]


def read(path: Path) -> dict[str, Lines]:
    """Return the lines of a CSV file, one for each run, by the rows of the comparison."""
    rows: dict[str, Lines] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            rows.setdefault(line["row"], []).append(line)
    return rows


def accuracy(images: str) -> Callable[[Lines], str]:
    """Return what shows the accuracy on "train", "validation" or "test" images."""
    return lambda runs: percent(mean([float(run[f"{images}_accuracy"]) for run in runs]))


# What shows a column of a row, by the column's title.
COLUMNS: dict[str, Callable[[Lines], str]] = {
    "parameters": lambda runs: f"{int(runs[0]['parameters']):,}",
    "mult-adds": lambda runs: millions(int(runs[0]["mult_adds"])),
    "seconds": lambda runs: seconds(mean([float(run["training_seconds"]) for run in runs]).value),
    "training, %": accuracy("train"),
    "validation, %": accuracy("validation"),
    "test, %": accuracy("test"),
    "seeds": lambda runs: str(len(runs)),
}
LECTURE = {
    "parameters": f"{lecture.PARAMETERS:,}",
    "seconds": f"{lecture.SECONDS}",
    "validation, %": percent(mean([lecture.VALIDATION_ACCURACY])),
    "seeds": "1",
}


def show(path: Path, columns: list[str], *, with_lecture: bool) -> str:
    """Return some columns of a comparison, and perhaps the lecture's own result below, as a table in Markdown."""
    lines = [[name, *(COLUMNS[column](runs) for column in columns)] for name, runs in read(path).items()]
    if with_lecture:
        lines.append([f"{lecture.NAME}, on its own GPU", *(LECTURE.get(column, "") for column in columns)])
    return table(["", *columns], lines)
