"""The whole table, an area for each file."""

from . import derivatives, dtypes, parts, running, tracers  # noqa: F401
from .table import FEATURES

__all__ = ["FEATURES"]
