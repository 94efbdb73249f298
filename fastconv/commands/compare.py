"""`fastconv compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastconv.commands.options import nonempty_path, out_option
from fastconv.console import console
from fastconv.training import folder, runs
from fastconv.training.comparison import files, reading, tables
from fastconv.training.comparison.rows import compare as compare_runs

STEM = "compare"


def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            parser=nonempty_path,
            help="Folders of runs or of sweeps, or checkpoints.",
            metavar="RUN...",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, out_option("Where to write the files.", "compare")] = None,
) -> None:
    """Compare training runs: parameters, multiplications, seconds, and accuracy as mean and deviation over seeds.

    Runs that differ in nothing but their seeds are one row. Writes the table as compare.md, all runs as
    compare.csv, accuracy against time and parameters as compare.png, and against epochs as compare-curves.png.
    """
    shown = console()
    runs.check_packages(tensorboard=False)
    if out is not None:
        files.check_new(out, files.names(STEM))
    found = [reading.read(path) for path in reading.find(paths)]
    rows = compare_runs(found)
    tables.show(rows, shown)
    if repeated := len(found) - sum(len(row.runs) for row in rows):
        shown.print(f"Left out {repeated}: their row has a run of the same seed.", soft_wrap=True)
    out = folder.make(out, STEM)
    shown.print(f"Saved {', '.join(files.write(rows, out, STEM))} in {out}", soft_wrap=True)
