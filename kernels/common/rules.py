"""What every implementation abides by. Imports no Triton, so that all can."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype to sum in: float32, or float64 if `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gelu(z: Tensor, approximate: str) -> Tensor:
    """The activation, where PyTorch computes it; `common/activation.py` is that of the kernels."""
    return F.gelu(z, approximate=approximate)


def gelu_backward(grad: Tensor, z: Tensor, approximate: str) -> Tensor:
    """The gradient of z, from that of gelu(z)."""
    return torch.ops.aten.gelu_backward(grad, z, approximate=approximate)


def is_traced() -> bool:
    """Whether a compiler, a tracer or a transform of torch.func sees what is called."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may come, for which an operation has to keep something."""
    # A tracer that has recorded a graph with gradients runs it again without, and refuses other constants.
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_differentiated_once() -> None:
    """In a backward: refuse `create_graph=True`, which asks for second derivatives that there are not.

    PyTorch's `once_differentiable` refuses only if the incoming gradient requires grad. That of `y.sum()` does
    not, and a gradient penalty would silently be constant.

    Raises:
        RuntimeError: gradients are recorded while the backward runs.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fastconv's operations can be differentiated once, but create_graph=True asks for more; "
            'use fastconv.backend("reference")'
        )
