"""Where an operation runs: on the chosen backend, or, if its kernels fail, on the portable one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv.kernels.common.errors import KernelError
from fastconv.operations import backends, fallback, selftest
from fastconv.operations.selftest import Subject

# As in kernels/operations.py, which imports Triton: on maps of more pixels the convolution has other kernels.
LARGEST_TOEPLITZ_MAP = 256
_CONVOLVING = ("convnext_block", "depthwise_conv_layer_norm")

# By all that decides: what is forced, the device, and the fields of a Subject.
_CHOSEN: dict[tuple[Any, ...], str] = {}


def run(operation: str, x: Tensor, parameters: tuple[Tensor | None, ...], options: dict[str, Any]) -> Tensor:
    """Call an operation on maps `x`; `options` may hold tensors too.

    Raises:
        BackendUnavailable: a forced backend cannot run it.
    """
    weight = parameters[0] if parameters else x
    assert weight is not None
    large = False
    if operation in _CONVOLVING:
        shape = x.shape
        large = shape[2] * shape[3] > LARGEST_TOEPLITZ_MAP
    subject = operation, options.get("norm"), large, x.dtype, weight.dtype
    if torch.compiler.is_compiling():
        name = _choose_for_graph(subject, x.device)
        return _call(name, operation, x, parameters, options)
    forced = backends.current()
    key = forced, x.device, subject
    name = _CHOSEN.get(key) or _choose(key, x, parameters, options)
    if name != "triton":
        return _call(name, operation, x, parameters, options)
    try:
        return _call(name, operation, x, parameters, options)
    except KernelError as error:
        if forced == "triton":
            raise backends.unavailable(operation, f"kernel {error.kernel}: {error.reason}") from error
        fallback.warn_refused(operation, error, x.device)
    return _call("portable", operation, x, parameters, options)


def _call(
    name: str, operation: str, x: Tensor, parameters: tuple[Tensor | None, ...], options: dict[str, Any]
) -> Tensor:
    return getattr(backends.implementation(name), operation)(x, *parameters, **options)


def _choose(
    key: tuple[Any, ...], x: Tensor, parameters: tuple[Tensor | None, ...], options: dict[str, Any]
) -> str:
    """The backend of an operation that meets a device or dtypes for the first time."""
    forced, device, subject = key[0], key[1], Subject(*key[2])
    name = backends.select(subject.operation, device, subject.maps, subject.dtype)
    if name == "triton" and forced == "auto":
        try:
            trusted = selftest.trusts(subject, device, selftest.sizes_of(subject, x, parameters, options))
        except KernelError:
            # That depends on sizes: each call meets it again.
            trusted = True
        if trusted is None:
            return name
        if not trusted:
            name = "portable"
    _CHOSEN[key] = name
    return name


def _choose_for_graph(subject: tuple[Any, ...], device: torch.device) -> str:
    """The backend of an operation that torch.compile traces."""
    operation, norm, large, maps, dtype = subject
    name = backends.select(operation, device, maps, dtype)
    if name == "triton" and backends.current() == "auto":
        from fastconv.operations import tracing

        if not tracing.trusts(operation, norm, large, maps, dtype, device):
            return "portable"
    return name
