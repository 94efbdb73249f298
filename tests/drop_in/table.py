"""The table of features: each takes a model and images, and returns tensors to be compared, by name."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Feature(NamedTuple):
    area: str
    run: Callable[..., dict[str, Any]]
    half: bool


FEATURES: dict[str, Feature] = {}


def feature(name: str, half: bool = False) -> Callable[..., Any]:
    """Enter a function into the table, in the area that its file is.

    Args:
        name: as the README shows it.
        half: whether it computes in half precision, and so is compared by the rule of `fastconv.accuracy`.
    """

    def enter(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        FEATURES[name] = Feature(run.__module__.rpartition(".")[2], run, half)
        return run

    return enter
