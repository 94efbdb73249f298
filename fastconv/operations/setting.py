"""Which implementation is forced, in each thread and asyncio task."""

from __future__ import annotations

import os
import weakref
from contextvars import ContextVar
from types import TracebackType
from typing import NamedTuple

# In the order in which "auto" tries them.
BACKENDS = ("triton", "native", "portable", "reference")
NAMES = (*BACKENDS, "auto")


class _Setting(NamedTuple):
    """
    Args:
        name: the forced backend, or "auto".
        outer: what the `with` blocks around return to, the innermost last.
        made: each `backend` that was made and not entered yet, and what was forced before it.
    """

    name: str
    outer: tuple[str, ...] = ()
    made: tuple[tuple[weakref.ref[forced], str], ...] = ()


# The environment variable is checked when it is used, because importing a package should not fail for it.
_DEFAULT = _Setting(os.environ.get("FASTCONV_BACKEND") or "auto")
_SETTING = ContextVar("fastconv_backend", default=_DEFAULT)


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


class forced:
    """Within a `with` block, which may be entered again and within itself, force a backend.

    Args:
        name: what `current` returned, here or in another thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        now, outer, made = _SETTING.get()
        # A block for which a `backend` was made ends with what was forced before that.
        before = next((before for other, before in made if other() is self), now)
        made = tuple(each for each in made if each[0]() is not self)
        _SETTING.set(_Setting(self._name, (*outer, before), made))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _, outer, made = _SETTING.get()
        # Without any, as where a generator goes on in another thread, nothing was forced here.
        if outer:
            _SETTING.set(_Setting(outer[-1], outer[:-1], made))


class backend(forced):
    """Force the implementation of all operations, from now on or within a `with` block.

    The setting is that of the calling thread or asyncio task, as that of `torch.no_grad` is the thread's; a new
    task inherits it, a new thread does not. The environment variable FASTCONV_BACKEND, which is read when fastconv
    is imported, is the default in all.

    Args:
        name: "triton", "native", "portable" or "reference"; or "auto" for the first of them that can run.

    Raises:
        ValueError: there is no such backend. That an existing one cannot run an operation shows when the
            operation is called, as `BackendUnavailable`.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend is {name!r}; expected one of {', '.join(NAMES)}")
        super().__init__(name)
        before, outer, made = _SETTING.get()
        kept = tuple(each for each in made if each[0]() is not None)
        _SETTING.set(_Setting(name, outer, (*kept, (weakref.ref(self), before))))
