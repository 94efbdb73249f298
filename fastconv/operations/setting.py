"""Which implementation is forced, in each thread and asyncio task."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import NamedTuple

# In the order in which "auto" tries them.
BACKENDS = ("triton", "portable", "reference")
NAMES = (*BACKENDS, "auto")


class _Setting(NamedTuple):
    """
    Args:
        name: the forced backend, or "auto".
        outer: what the `with` blocks around return to, the innermost last.
        made: the last `backend` that was made and not entered since, and what was forced before it.
    """

    name: str
    outer: tuple[str, ...] = ()
    made: tuple[backend, str] | None = None


# The environment variable is checked when it is used, because importing a package should not fail for it.
_SETTING = ContextVar("fastconv_backend", default=_Setting(os.environ.get("FASTCONV_BACKEND") or "auto"))


def current() -> str:
    """The forced backend, or "auto"."""
    return _SETTING.get().name


def __getattr__(name: str) -> str:
    """`setting.traced` is `current()` for code that torch.compile traces.

    A compiled graph is used only while what it read stays the same. Attributes of modules can be watched like
    that; Dynamo before torch 2.14 cannot trace a ContextVar.
    """
    if name == "traced":
        return current()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class backend:
    """Force the implementation of all operations, from now on or within a `with` block.

    The setting is that of the calling thread or asyncio task, as that of `torch.no_grad` is the thread's; a new
    task inherits it, a new thread does not. The environment variable FASTCONV_BACKEND, which is read when fastconv
    is imported, is the default in all.

    Args:
        name: "triton", "portable" or "reference"; or "auto" for the first of them that can run.

    Raises:
        ValueError: there is no such backend. That an existing one cannot run an operation shows when the
            operation is called, as `BackendUnavailable`.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend is {name!r}; expected one of {', '.join(NAMES)}")
        self._name = name
        before, outer, _ = _SETTING.get()
        _SETTING.set(_Setting(name, outer, (self, before)))

    def __enter__(self) -> None:
        now, outer, made = _SETTING.get()
        # Where it was made for this block, the block ends with what was forced before that.
        before = made[1] if made is not None and made[0] is self else now
        _SETTING.set(_Setting(self._name, (*outer, before)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outer = _SETTING.get().outer
        # Without any, as where a generator goes on in another thread, nothing was forced here.
        if outer:
            _SETTING.set(_Setting(outer[-1], outer[:-1]))


@contextmanager
def restored(name: str) -> Iterator[None]:
    """Within a `with` block, force what `current` returned in another thread."""
    token = _SETTING.set(_Setting(name))
    try:
        yield
    finally:
        _SETTING.reset(token)
