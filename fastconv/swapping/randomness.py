"""Random numbers for a probe: the same ones every time, and none that others would have drawn.

Generators belong to the whole process, and other threads draw from them while a probe runs.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Unrepeatable(Exception):
    """A forward draws random numbers that a probe cannot draw again; the message says which."""


class PrivateGenerator(TorchDispatchMode):
    """Gives each operation of this thread a generator of ours, where it would take PyTorch's global one.

    Raises:
        Unrepeatable: an operation is given another generator, or takes none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(1)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise Unrepeatable(
                "it draws random numbers from a generator of its own; expected PyTorch's global one"
            )
        return _with_generator(func)(*args, **{**kwargs, "generator": self.generator})


def _with_generator(func: Any) -> Any:
    """The overload of an operation that takes a generator."""

    def arguments(overload: Any) -> list[tuple[str, str]]:
        taken = overload._schema.arguments
        return [(each.name, str(each.type)) for each in taken if each.name != "generator"]

    packet = func.overloadpacket
    for overload in func, *(getattr(packet, name) for name in packet.overloads()):
        takes_one = any(each.name == "generator" for each in overload._schema.arguments)
        if takes_one and arguments(overload) == arguments(func):
            return overload
    raise Unrepeatable(f"it draws random numbers by {func}, which takes no generator")


class OthersWatched(TorchFunctionMode):
    """Watches the global generators of Python and NumPy, which have no such hook, while a forward runs.

    Their states are compared around each stretch of Python code between two operations of PyTorch: during an
    operation Python runs other threads, which may draw too.

    Raises:
        Unrepeatable: at the end, if the forward drew from them. They are then set back to where they were.
    """

    def __enter__(self) -> OthersWatched:
        self._changed = False
        self._first = self._last = _states()
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._compare()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._last = _states()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._compare()
        if self._changed:
            _restore(self._first)
            raise Unrepeatable(
                "it draws random numbers from Python's or NumPy's global generator; expected those of torch.rand"
            )

    def _compare(self) -> None:
        self._changed = self._changed or _states() != self._last


def _states() -> bytes:
    numpy = sys.modules.get("numpy.random")
    return pickle.dumps((random.getstate(), numpy and numpy.get_state(legacy=False)))


def _restore(states: bytes) -> None:
    python, numpy = pickle.loads(states)
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy.random"].set_state(numpy)
