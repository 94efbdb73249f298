"""Where a program spends its time: seconds by part, and by part of a part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """Measures wall-clock time, and each moment once: while an inner part runs, the outer one stands still.

    `seconds` maps the names of a part and those around it, outermost first, to its time; () is what no part has.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, ...], float] = defaultdict(float)
        self._names: tuple[str, ...] = ()
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the body of a `with` statement as the part of that name."""
        outer = self._names
        self._enter((*outer, name))
        try:
            yield
        finally:
            self._enter(outer)

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; the time that they take to come is the part of that name."""
        with self.part(name):
            iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _enter(self, names: tuple[str, ...]) -> None:
        now = time.perf_counter()
        self.seconds[self._names] += now - self._since
        self._names, self._since = names, now
