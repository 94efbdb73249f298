"""Which implementation of an operation runs, and if one cannot, why not."""

from __future__ import annotations

import os
from types import ModuleType, TracebackType

from torch import Tensor

from fastconv import portable, reference

OPERATIONS = (
    "depthwise_conv_layer_norm",
    "pointwise_conv_gelu",
    "convnext_block",
    "layer_norm",
    "patch_conv",
)
# In the order in which "auto" tries them.
BACKENDS = ("triton", "portable", "reference")

_MODULES: dict[str, ModuleType] = {"portable": portable, "reference": reference}


class BackendUnavailable(RuntimeError):
    """A forced backend cannot run an operation; the message says why and what to do."""


def _validated(name: str, source: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join((*BACKENDS, 'auto'))}")
    return name


_forced = _validated(os.environ.get("FASTCONV_BACKEND") or "auto", "FASTCONV_BACKEND")


def current() -> str:
    """The forced backend, or "auto"."""
    return _forced


class backend:
    """Force the implementation of all operations, from now on or within a `with` block.

    The setting is one per process. It overrides the environment variable FASTCONV_BACKEND, which is read when
    fastconv is imported.

    Args:
        name: "triton", "portable" or "reference"; or "auto" for the first of them that can run.

    Raises:
        ValueError: there is no such backend. That an existing one cannot run an operation shows when the
            operation is called, as `BackendUnavailable`.
    """

    def __init__(self, name: str) -> None:
        global _forced
        self._previous = _forced
        _forced = _validated(name, "backend")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._previous


def can_run(backend: str, operation: str, x: Tensor) -> str | None:
    """Return None if `backend` can run `operation` on an input like `x`, else the reason why not."""
    if backend == "triton":
        return "this version of fastconv has no Triton kernels yet"
    return None


def select(operation: str, x: Tensor) -> ModuleType:
    """Return the module that is to run `operation` on `x`.

    Raises:
        BackendUnavailable: a forced backend cannot.
    """
    if _forced != "auto":
        if reason := can_run(_forced, operation, x):
            raise BackendUnavailable(
                f'backend "{_forced}" cannot run {operation}: {reason}; use "auto", "portable" or "reference"'
            )
        return _MODULES[_forced]
    return next(_MODULES[name] for name in BACKENDS if can_run(name, operation, x) is None)
