"""Options that several commands have, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from fastconv import machine
from fastconv.operations import backends
from fastconv.training.recipe import Recipe

DEFAULTS = Recipe()

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Directory that holds CIFAR-10 (cifar-10-batches-py or cifar-10-batches-bin), or images of one "
        "size in train/<class>/ and test/<class>/. Without it CIFAR-10 is downloaded once, into "
        "$FASTCONV_CACHE or ~/.cache/fastconv.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps", rich_help_panel="Machine")
]
BackendOption = Annotated[
    Literal["auto", "triton", "portable", "reference"],
    typer.Option(help="Implementation of the fused operations.", rich_help_panel="Machine"),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, and all else on standard error.")
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="checkpoint.pt of a training run.", show_default=False)
]
WidthOption = Annotated[int, typer.Option(help="Channels of the first stage.", rich_help_panel="Model")]
DepthOption = Annotated[int, typer.Option(help="Blocks in each of the two stages.", rich_help_panel="Model")]
PatchOption = Annotated[int, typer.Option(help="Side of the stem's patches, pixels.", rich_help_panel="Model")]


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError about an argument into the command line's own kind of error, with exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def choose(device: str, backend: str) -> torch.device:
    """Return the device of that name, and run the operations on that backend."""
    with usage_errors():
        place = machine.choose_device(device)
        backends.force(backend, place)
    return place
