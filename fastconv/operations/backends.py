"""Which implementation of an operation runs, and if one cannot, why not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastconv.operations import definition, portable, setting
from fastconv.operations.setting import BACKENDS as BACKENDS
from fastconv.operations.setting import backend as backend

OPERATIONS = tuple(definition.PARAMETERS)

# Those whose kernels nobody has proved on this machine, and so are tested at their first use.
TESTED = ("triton", "native")

_MODULES: dict[str, ModuleType] = {"portable": portable}
_IMPORTED_AT_FIRST_USE = {"triton": "fastconv.kernels.operations", "native": "fastconv.operations.native"}
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton too reads this variable once, when it is imported.
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The first with tensor cores that Triton compiles for; and the first that has bfloat16.
_LEAST_CAPABILITY, _BFLOAT16_CAPABILITY = (7, 5), (8, 0)


class BackendUnavailable(RuntimeError):
    """A forced backend cannot run an operation; the message says why and what to do."""


def current() -> str:
    """The forced backend, or "auto"."""
    return setting.traced if torch.compiler.is_compiling() else setting.current()


def candidates() -> tuple[str, ...]:
    """The backends that may run, in order of preference.

    Raises:
        BackendUnavailable: the environment variable FASTCONV_BACKEND names none.
    """
    forced = current()
    if forced not in setting.NAMES:
        raise BackendUnavailable(f"FASTCONV_BACKEND is {forced!r}; expected one of {', '.join(setting.NAMES)}")
    return BACKENDS if forced == "auto" else (forced,)


def can_run(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if `backend` can compute in `dtype` on `device`, else the reason why not, and what can.

    The first time that "native" is asked for, its kernels are compiled.

    Raises:
        BackendUnavailable: FASTCONV_NATIVE is neither 0 nor 1.
    """
    if backend == "native":
        return _native_refuses(device.type, dtype)
    if backend != "triton":
        return None
    if not _TRITON_INSTALLED:
        return "Triton is not installed (it exists for Linux: pip install triton)"
    kind = device.type
    if kind == "cuda":
        return _gpu_refuses(device, dtype)
    if kind != "cpu":
        return f"it runs on GPUs of NVIDIA and AMD, not on {kind}"
    if not _TRITON_INTERPRETED:
        return "on a CPU it needs TRITON_INTERPRET=1 in the environment, which interprets its kernels"
    # Interpretation is slow, and only good for checking the kernels.
    return None if current() == "triton" else "its kernels are interpreted on a CPU only if it is forced"


@functools.cache
def _native_refuses(kind: str, dtype: torch.dtype) -> str | None:
    if kind != "cpu":
        return f"it runs on CPUs, not on {kind}"
    if dtype != torch.float32:
        return "its kernels take float32 only"
    setting = os.environ.get("FASTCONV_NATIVE") or "1"
    if setting not in ("0", "1"):
        raise BackendUnavailable(f"FASTCONV_NATIVE is {setting!r}; expected 0, for no kernels in C++, or 1")
    if setting == "0":
        return "FASTCONV_NATIVE=0 turns it off"
    # Not by `import fastconv`.
    from fastconv.kernels.cpu import library

    try:
        library.load()
    except library.Unavailable as error:
        return str(error)
    return None


@functools.cache
def _gpu_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "its kernels do not take float64"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
    if capability < _LEAST_CAPABILITY:
        return f"{name}; its kernels need 7.5 or newer"
    if dtype == torch.bfloat16 and capability < _BFLOAT16_CAPABILITY:
        return f"{name}, and bfloat16 needs 8.0 or newer: use float16, under autocast dtype=torch.float16"
    return None


def implementation(backend: str) -> ModuleType:
    """The module of a backend other than the reference, whose operations take values."""
    if backend not in _MODULES:
        _MODULES[backend] = importlib.import_module(_IMPORTED_AT_FIRST_USE[backend])
    return _MODULES[backend]


def choose(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """The backend that is to compute on `device` with tensors of `dtypes`; None if the forced one cannot."""
    if torch.compiler.is_compiling():
        from fastconv.operations import tracing

        return tracing.first_that_can(current(), device, *dtypes)
    return first_that_can(device, *dtypes)


def first_that_can(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """As `choose`, for code that torch.compile does not trace."""
    for name in candidates():
        if all(can_run(name, device, dtype) is None for dtype in dtypes):
            return name
    return None


def select(operation: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend that is to run `operation` on `device`, with tensors of `dtypes`.

    Raises:
        BackendUnavailable: a forced backend cannot.
    """
    name = choose(device, *dtypes)
    if name is None:
        reasons = (can_run(current(), device, dtype) for dtype in dtypes)
        raise unavailable(operation, next(filter(None, reasons)))
    return name


def unavailable(operation: str, reason: str) -> BackendUnavailable:
    """The error that says why the forced backend cannot run an operation."""
    return BackendUnavailable(
        f'backend "{current()}" cannot run {operation}: {reason}; use "auto", "portable" or "reference"'
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast, if it is on for the device of `x`, computes convolutions; else None."""
    # The type of a device takes longer to get.
    kind = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    # The meta device has none, and to ask is an error there.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def leaves_to_pytorch(x: Tensor) -> bool:
    """Whether PyTorch's own operations are to run where those for CPUs are slower than they are."""
    if current() != "auto":
        return False
    # Autocast leaves float64 alone.
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype
    return choose(x.device, dtype) in ("native", "portable")


def force(name: str, device: torch.device) -> None:
    """Force a backend; raises BackendUnavailable if it cannot run on `device`."""
    if name != "auto":
        backend(name)
    select(OPERATIONS[0], device, torch.float32)


def choices(device: torch.device) -> dict[str, dict[str, Any]]:
    """For each operation the backend that runs it on `device`, None if none can, and why not the others."""
    reasons = {name: can_run(name, device, torch.float32) for name in candidates()}
    choice = {
        "runs": next((name for name, reason in reasons.items() if reason is None), None),
        "refused": {name: reason for name, reason in reasons.items() if reason is not None},
    }
    return dict.fromkeys(OPERATIONS, choice)
