"""Runs an operation on the chosen backend, or, if its kernels fail, on the portable one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv.kernels import decisions
from fastconv.kernels.common.errors import KernelError
from fastconv.kernels.common.values import Convolution, Norm, Value
from fastconv.operations import backends, definition, fallback, layouts, selftest, setting
from fastconv.operations.selftest import Subject
from fastconv.operations.watchers import is_composed

_CONVOLVING = ("convnext_block", "depthwise_conv_layer_norm")

# The backend for each forced backend, device and Subject.
_CHOSEN: dict[tuple[Any, ...], str] = {}


def run(operation: str, x: Tensor, values: tuple[Value, ...], unseen: bool = False) -> Tensor:
    """Call an operation on maps `x`, with its values in the order of the public signature.

    Args:
        unseen: the result, and the gradient of `x`, go from one operation of ours to another: they may lie as
            suits these, instead of as PyTorch's own would.

    Raises:
        BackendUnavailable: a forced backend cannot run it.
    """
    norm, approximate, maps, first = None, None, x.dtype, values[0]
    for value in values:
        if isinstance(value, Norm):
            norm = value.over
        elif isinstance(value, str):
            approximate = value
    dtype = first.weight.dtype if isinstance(first, Convolution) else maps
    large = operation in _CONVOLVING and decisions.is_large(x)
    subject = operation, norm, large, maps, dtype, approximate
    if is_composed(x, *values):
        return definition.call(operation, x, *values)
    if torch.compiler.is_compiling():
        return _call(_backend_for_graph(subject, x.device), operation, x, values, unseen)
    forced = setting.current()
    # Kernels read memory as it is; in that of the imaginary part of a conjugate the sign is the other.
    if x.is_neg():
        x = x.resolve_neg()
    key = forced, x.device, subject
    name = _CHOSEN.get(key) or _backend_at_first_use(key, x, values)
    try:
        return _call(name, operation, x, values, unseen)
    except KernelError as error:
        if forced == "triton":
            raise backends.unavailable(operation, f"kernel {error.kernel}: {error.reason}") from error
        fallback.warn_refused(operation, error, x.device)
    return _call("portable", operation, x, values, unseen)


def _call(backend: str, operation: str, x: Tensor, values: tuple[Value, ...], unseen: bool) -> Tensor:
    # For a caller, to bring patches into batch-last and back takes longer than their product.
    if backend == "reference" or (operation == "patch_conv" and not unseen and backends.current() == "auto"):
        return definition.call(operation, x, *values)
    implementation = getattr(backends.implementation(backend), operation)
    if unseen:
        return implementation(x, *values)
    result, gradient = layouts.of(operation, x, values)
    return layouts.as_pytorch(implementation(layouts.with_gradient(x, gradient), *values), result)


def _backend_at_first_use(key: tuple[Any, ...], x: Tensor, values: tuple[Value, ...]) -> str:
    """The backend of an operation that meets a device or dtypes for the first time."""
    forced, device, subject = key[0], key[1], Subject(*key[2])
    name = backends.select(subject.operation, device, subject.maps, subject.dtype)
    if name in backends.TESTED and forced == "auto":
        try:
            trusted = selftest.trusts(name, subject, device, selftest.sizes_of(subject, x, values))
        except KernelError:
            # Whether a kernel compiles depends on sizes: later calls may raise this too.
            trusted = True
        if trusted is None:
            return name
        if not trusted:
            name = "portable"
    _CHOSEN[key] = name
    return name


def _backend_for_graph(subject: tuple[Any, ...], device: torch.device) -> str:
    """The backend of an operation that torch.compile traces."""
    from fastconv.operations import tracing

    operation, norm, large, maps, dtype, approximate = subject
    name = backends.select(operation, device, maps, dtype)
    tested = name in backends.TESTED and backends.current() == "auto"
    if not tested:
        return name
    # The maps' size may be a symbol; the branch makes the graph one for large maps, or one for others.
    sized = False
    if large:
        sized = True
    trusted = tracing.trusts(name, device, operation, norm, sized, maps, dtype, approximate)
    return name if trusted else "portable"
