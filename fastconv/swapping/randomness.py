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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Where another thread draws from the same generators all the time, one run in some twenty sees only its own.
RUNS = 100


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


def refuse_other_generators(module: nn.Module, x: Tensor) -> None:
    """Run the forward of a module, to see whether it draws from Python's or NumPy's global generator.

    They have no such hook. If each of several runs changes them, they are set back to where they were.

    Raises:
        Unrepeatable: it does.
    """
    first = _states()
    for _ in range(RUNS):
        with torch.no_grad(), _Watch() as watch:
            module.forward(x)
        if not watch.changed:
            return
    _restore(first)
    raise Unrepeatable("it draws random numbers from Python's or NumPy's global generator; expected torch.rand")


class _Watch(TorchFunctionMode):
    """Compares their states around each stretch of Python code between two operations of PyTorch.

    During an operation Python runs other threads, which may draw too; within such a stretch it does so less often.
    """

    def __enter__(self) -> _Watch:
        super().__enter__()
        # What operations returned: to free a tensor lets other threads run, too.
        self._kept: list[Any] = []
        self.changed, self._last = False, _states()
        return self

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._compare()
        with PrivateGenerator():
            result = func(*args, **(kwargs or {}))
        self._kept.append(result)
        self._last = _states()
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._compare()
        self._kept.clear()
        super().__exit__(kind, error, trace)

    def _compare(self) -> None:
        self.changed = self.changed or _states() != self._last


def _states() -> tuple[Any, bytes | None]:
    numpy = sys.modules.get("numpy.random")
    return random.getstate(), None if numpy is None else pickle.dumps(numpy.get_state(legacy=False))


def _restore(states: tuple[Any, bytes | None]) -> None:
    python, numpy = states
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy.random"].set_state(pickle.loads(numpy))
