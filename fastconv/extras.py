"""Packages that only some commands need, imported when they do."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from typing import Any


class MissingPackage(Exception):
    """A package of an extra is not installed. The message is one line, and says how to install it."""


def import_extra(module: str) -> Any:
    """Import a module of the extras `train` and `tensorboard`, or timm.

    Raises:
        MissingPackage: it cannot be imported.
    """
    try:
        if module.partition(".")[0] == "matplotlib" and "matplotlib" not in sys.modules:
            _import_matplotlib()
        return importlib.import_module(module)
    except ImportError as error:
        extra = "tensorboard" if module == "torch.utils.tensorboard" else "train"
        install = "timm" if module == "timm" else f'"fastconv[{extra}]"'
        raise MissingPackage(
            f"{module} cannot be imported ({error}); install it with: pip install {install}"
        ) from error


def _import_matplotlib() -> None:
    """Import matplotlib whatever MPLBACKEND says.

    It cannot be imported where that names a backend that is not installed, such as the one that notebooks set. The
    backend is for windows: no picture of ours needs it. Where it is installed, the user's own are shown by it.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        matplotlib = importlib.import_module("matplotlib")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
