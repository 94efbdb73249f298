"""The warning that the portable backend runs in the place of kernels that cannot, or must not."""

from __future__ import annotations

import warnings
from textwrap import shorten

import torch

from fastconv import machine
from fastconv.kernels.common.errors import KernelError

INSTEAD = "The portable backend runs instead"
_WARNED: set[tuple[str, ...]] = set()


def warn_refused(operation: str, error: KernelError, device: torch.device) -> None:
    """Warn, once for each kernel and reason, that a kernel can be neither compiled nor loaded."""
    problem = f"Triton kernel {error.kernel} of {operation} cannot run: {shorten(error.reason, 300)}"
    _warn((error.kernel, error.reason), problem, device)


def warn_wrong(backend: str, subject: str, reason: str, device: torch.device) -> None:
    """Warn, once for each subject, that the self-test found its kernels wrong."""
    problem = f"the {backend} kernels of {subject} failed their self-test ({reason})"
    _warn((backend, subject, str(device)), problem, device)


def _warn(key: tuple[str, ...], problem: str, device: torch.device) -> None:
    if key in _WARNED:
        return
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    warnings.warn(
        f"fastconv: {problem}. {INSTEAD}, with right results but slower. Please report "
        f"this at fastconv's issue tracker, with what `fastconv info` prints: {machine.gpu_name(device)} "
        f"({machine.architecture(device)}), {versions}",
        RuntimeWarning,
        stacklevel=2,
    )
    # Only after the warning: where warnings are errors, every call must raise.
    _WARNED.add(key)
