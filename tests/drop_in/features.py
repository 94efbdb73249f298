"""The whole table, an area in each file, and what the README says of it."""

from typing import NamedTuple

from . import derivatives, dtypes, parts, running, tracers  # noqa: F401
from .table import FEATURES


class Area(NamedTuple):
    """
    Args:
        title: as the README names it.
        fused, swapped: what computes, in fused modules and in swapped models.
    """

    title: str
    fused: str
    swapped: str


AREAS = {
    "derivatives": Area("derivatives", "fused; beyond the first derivative composed", "as fused modules"),
    "tracers": Area("tracers", "fused under `torch.compile`, else composed", "as fused modules, or own forward"),
    "parts": Area(
        "parts", "fused; a block with a changed part calls its parts", "fused; such a block: own forward"
    ),
    "dtypes": Area("dtypes, devices", "fused", "fused; several dtypes in a block: own forward"),
    "running": Area(
        "running", "fused; subclasses of tensors composed", "fused; subclasses: own forward or composed"
    ),
}


def table() -> str:
    """The README's table: a row for each area."""
    rows = ["| | works | fused modules | swapped models |", "|---|---|---|---|"]
    for area, (title, fused, swapped) in AREAS.items():
        names = ", ".join(name for name, feature in FEATURES.items() if feature.area == area)
        rows.append(f"| {title} | {names} | {fused} | {swapped} |")
    return "\n".join(rows)
