"""What every implementation abides by. Imports no Triton, so that all can."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
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
    """Whether a compiler or a transform of torch.func sees what is called."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) or forward mode computes more than what is called."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_of_transform(grad: Tensor) -> bool:
    """In a backward: whether a transform computes it, or several gradients at once (`is_grads_batched=True`)."""
    if is_transformed():
        return True
    # Under a compiler none is several, and it does not know the question.
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may come, for which an operation has to keep something."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
