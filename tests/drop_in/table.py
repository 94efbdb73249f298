"""The table of features: each takes a model and images, and returns tensors to be compared, by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

Run = Callable[..., dict[str, Any]]


class Feature(NamedTuple):
    """
    Args:
        area: the name of its file.
        run: called with a model, which it may change, and images.
        half: whether it computes in half precision, unless the images are float64.
    """

    area: str
    run: Run
    half: bool


FEATURES: dict[str, Feature] = {}


def feature(name: str, half: bool = False) -> Callable[[Run], Run]:
    """Enter a function into the table, by its name in the README."""

    def enter(run: Run) -> Run:
        FEATURES[name] = Feature(run.__module__.rpartition(".")[2], run, half)
        return run

    return enter
