"""Packages that only some commands need, imported when they do."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackage(Exception):
    """A package of the `train` extra is not installed. The message is one line, and says how to install it."""


def import_extra(module: str) -> Any:
    """Import a module of the `train` extra, or timm.

    Raises:
        MissingPackage: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = "timm" if module == "timm" else '"fastconv[train]"'
        raise MissingPackage(
            f"{module} cannot be imported ({error}); install it with: pip install {install}"
        ) from error
