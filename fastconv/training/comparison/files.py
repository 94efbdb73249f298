"""The files that a comparison is written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from fastconv.files import write_atomically
from fastconv.training.comparison import plots, tables
from fastconv.training.comparison.rows import Row
from fastconv.training.folder import FolderError, held_in


def names(stem: str) -> tuple[str, ...]:
    """Return the names of all files: a table in Markdown, all runs as CSV, and two pictures."""
    return f"{stem}.md", f"{stem}.csv", f"{stem}.png", f"{stem}-curves.png"


def check_new(folder: Path, files: Sequence[str]) -> None:
    """Raise FolderError if one of these files is in a folder already, or if it is no folder."""
    if held := held_in(folder, files):
        raise FolderError(f"{folder} holds {', '.join(held)}, which would be replaced; give another --out")


def write(rows: Sequence[Row], folder: Path, stem: str, also: str = "") -> list[str]:
    """Write the files, replacing those that are there; return the names of those that were written.

    Args:
        rows: at least one. Pictures need one that has done an epoch.
        also: text for the end of the Markdown.

    Raises:
        WriteError: a file cannot be written.
    """
    table, records, scatter, curves = names(stem)
    contents: dict[str, Callable[[BinaryIO], object]] = {}
    text = tables.markdown(rows) + also
    if any(row.validation is not None for row in rows):
        contents[scatter] = lambda file: plots.scatter(rows, file)
        contents[curves] = lambda file: plots.curves(rows, file)
        text += (
            f"\n![Validation accuracy against time and parameters]({scatter})\n\n"
            f"![Validation accuracy against epochs]({curves})\n"
        )
    contents[table] = lambda file: file.write(text.encode())
    contents[records] = lambda file: file.write(tables.as_csv(rows).encode())
    for name in names(stem):
        if name in contents:
            write_atomically(folder / name, contents[name])
    return [name for name in names(stem) if name in contents]
