"""Which implementation of an operation runs, and if one cannot, why not."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType, TracebackType

import torch
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
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton too reads it once, when it is imported.
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The first with bfloat16 and tf32 in its tensor cores.
_LEAST_CAPABILITY = (8, 0)


class BackendUnavailable(RuntimeError):
    """A forced backend cannot run an operation; the message says why and what to do."""


_NAMES = (*BACKENDS, "auto")
# What the environment says is checked when it is used: importing a package should not fail for it.
_forced = os.environ.get("FASTCONV_BACKEND") or "auto"


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
        if name not in _NAMES:
            raise ValueError(f"backend is {name!r}; expected one of {', '.join(_NAMES)}")
        self._name, self._previous = name, _forced
        _forced = name

    def __enter__(self) -> None:
        global _forced
        _forced = self._name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._previous


def candidates() -> tuple[str, ...]:
    """The backends that may run, in order of preference.

    Raises:
        BackendUnavailable: the environment variable FASTCONV_BACKEND names none.
    """
    if _forced not in _NAMES:
        raise BackendUnavailable(f"FASTCONV_BACKEND is {_forced!r}; expected one of {', '.join(_NAMES)}")
    return BACKENDS if _forced == "auto" else (_forced,)


def can_run(backend: str, x: Tensor) -> str | None:
    """Return None if `backend` can run the operations on an input like `x`, else the reason why not."""
    if backend != "triton":
        return None
    if not _TRITON_INSTALLED:
        return "Triton is not installed (it exists for Linux: pip install triton)"
    if x.device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(x.device) < _LEAST_CAPABILITY:
            return f"{torch.cuda.get_device_name(x.device)} is older than compute capability 8.0"
        return "its kernels do not take float64" if x.dtype == torch.float64 else None
    if x.device.type != "cpu":
        return f"it runs on GPUs of NVIDIA and AMD, not on {x.device.type}"
    if not _TRITON_INTERPRETED:
        return "on a CPU it needs TRITON_INTERPRET=1 in the environment, which interprets its kernels"
    # Only to see that they are right: it is slow.
    return None if _forced == "triton" else "its kernels are interpreted on a CPU only if it is forced"


def _module(backend: str) -> ModuleType:
    # Triton is imported where it is used first, and not by `import fastconv`.
    if backend not in _MODULES:
        _MODULES[backend] = importlib.import_module("fastconv.kernels.operations")
    return _MODULES[backend]


def choose(x: Tensor) -> str | None:
    """The backend that is to run the operations on `x`; None if the forced one cannot."""
    return next((name for name in candidates() if can_run(name, x) is None), None)


def leaves_to_pytorch(x: Tensor) -> bool:
    """Whether, where the portable backend is slower than PyTorch's own operations, those are to run."""
    return _forced == "auto" and choose(x) == "portable"


def select(operation: str, x: Tensor) -> ModuleType:
    """Return the module that is to run `operation` on `x`.

    Raises:
        BackendUnavailable: a forced backend cannot.
    """
    name = choose(x)
    if name is None:
        raise BackendUnavailable(
            f'backend "{_forced}" cannot run {operation}: {can_run(_forced, x)}; '
            'use "auto", "portable" or "reference"'
        )
    return _module(name)
