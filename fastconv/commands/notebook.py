"""`fastconv notebook`."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from fastconv.commands.options import nonempty_path
from fastconv.console import console
from fastconv.files import write_atomically
from fastconv.notebook import convert
from fastconv.training import data
from fastconv.training.data import DataError


def notebook(
    path: Annotated[
        Path, typer.Argument(parser=nonempty_path, metavar="PATH", help="A new file, named *.ipynb.")
    ] = Path("fastconv.ipynb"),
    data_directory: Annotated[
        Path | None,
        typer.Option(
            "--data",
            parser=nonempty_path,
            metavar="PATH",
            help="Directory that holds CIFAR-10, which the notebook is to read. Without it the notebook downloads "
            "CIFAR-10 once, as fastconv train does.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a Jupyter notebook that walks through the lecture with fused modules.

    It runs in one to two minutes on two CPU cores, on a small part of CIFAR-10.
    """
    if path.suffix != ".ipynb":
        raise typer.BadParameter(f"PATH is {path}; expected a name that ends in .ipynb, by which Jupyter opens it")
    if os.path.lexists(path):
        raise typer.BadParameter(f"{path} is there; give the path of a new file, or remove this one")
    settings = {} if data_directory is None else {"DATA": cifar10_directory(data_directory)}
    found = convert.convert(convert.LECTURE.read_text(encoding="utf-8"), settings)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    console().print(f"Wrote {path}; open it with:\n  {shlex.join(['jupyter', 'lab', str(path)])}", soft_wrap=True)


def cifar10_directory(directory: Path) -> str:
    """Return the absolute path of a folder that holds CIFAR-10.

    Raises:
        DataError: it holds something else, or cannot be used.
    """
    dataset = data.load(directory)
    if dataset.classes != data.CIFAR10_CLASSES:
        raise DataError(
            f"{directory} has the classes {', '.join(dataset.classes)}; expected CIFAR-10, which the notebook is "
            "about; leave --data out to download it"
        )
    assert dataset.directory is not None
    return dataset.directory
