"""From Python in the percent format to a Jupyter notebook.

Jupytext defines the percent format, which editors run cell by cell: `# %%` opens a cell of code, `# %% [markdown]`
a cell of text, whose lines are comments. A line of code that Python does not know, such as `!ls`, is a comment,
too.
Source: https://jupytext.readthedocs.io/en/latest/formats-scripts.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CODE, MARKDOWN = "# %%", "# %% [markdown]"
LECTURE = Path(__file__).with_name("lecture.py")


def convert(source: str, settings: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Return a notebook in nbformat 4.5, without outputs, to be written as JSON.

    Args:
        source: Python in the percent format; what stands above the first cell is left out.
        settings: values, by names that the source assigns in a line of their own; they replace the source's.
    """
    for name, value in (settings or {}).items():
        source = _assign(source, name, value)
    cells: list[tuple[str, list[str]]] = []
    for line in source.splitlines():
        if line in (CODE, MARKDOWN):
            cells.append((line, []))
        elif cells:
            cells[-1][1].append(line)
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        },
        "cells": [_cell(number, kind, lines) for number, (kind, lines) in enumerate(cells, 1)],
    }


def _assign(source: str, name: str, value: object) -> str:
    # A function, because in a string the backslashes of a path would be escapes.
    source, count = re.subn(rf"(?m)^{name} = \S+", lambda _: f"{name} = {value!r}", source)
    assert count == 1, f"{count} lines assign {name}; expected one"
    return source


def _cell(number: int, kind: str, lines: list[str]) -> dict[str, Any]:
    common = {"id": f"cell-{number}", "metadata": {}}
    if kind == MARKDOWN:
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
        return {"cell_type": "markdown", **common, "source": text.strip()}
    text = "\n".join(line.removeprefix("# ") if line.startswith("# !") else line for line in lines)
    return {"cell_type": "code", **common, "source": text.strip(), "execution_count": None, "outputs": []}
