"""How maps (N, C, H, W) lie in memory: strides as kernels take them, and results in the format of an input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import rules


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if the channels of `x` lie side by side, though perhaps not its pixels: else contiguous."""
    side_by_side = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if side_by_side else torch.contiguous_format


def new_maps(x: Tensor, channels: int) -> Tensor:
    """Uninitialised maps like `x` but for their channels, in its memory format."""
    size = x.shape[0], channels, *x.shape[2:]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def new_channels_last(x: Tensor, channels: int) -> Tensor:
    """Uninitialised maps like `x` but for their channels, which lie side by side."""
    size = x.shape[0], channels, *x.shape[2:]
    # Not a view of NHWC memory: autograd forbids to change a view in place that a custom function returned.
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def new_like(x: Tensor) -> Tensor:
    """Uninitialised maps like `x`, in its memory format; never with the strides of a view."""
    return torch.empty_like(x, memory_format=memory_format(x))


def gradient_like(weight: Tensor, gradient: Tensor) -> Tensor:
    """A contiguous gradient with the shape and the strides of its contiguous weight.

    The strides of dimensions of one element differ, too, where weights were converted to channels_last; and
    DistributedDataParallel copies, with a warning, what has others than the parameter.
    """
    return gradient.as_strided(weight.shape, weight.stride())


class OwnStrides(torch.autograd.Function):
    """A weight as it is, whose gradient gets its strides: DistributedDataParallel copies, with a warning, others.

    Those of a dimension of one element count, too, which differ from what PyTorch's own gradients have.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.strides = weight.stride()
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if rules.is_of_transform(grad):
            return grad
        return torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def with_own_strides(weight: Tensor, by_pytorch: bool = False) -> Tensor:
    """A convolution's weight whose gradient gets its strides, whatever lies between the two.

    Gradients are contiguous, as most weights are; that of a depthwise convolution `by_pytorch` is not even then.
    """
    if not torch.is_grad_enabled() or not weight.requires_grad:
        return weight
    _, _, height, width = weight.shape
    _, *strides = weight.stride()
    # Some of those who see each operation do not know a function of ours.
    if (strides == [height * width, width, 1] and not by_pytorch) or rules.is_transformed():
        return weight
    return OwnStrides.apply(weight)


def block_gradient_sizes(inputs: Any) -> list[int]:
    """How large a block's gradients of weight, projection, their biases, depthwise weight and its bias are.

    Its backward, with these inputs, writes them into one vector in this order.
    """
    weight, projection, depthwise_weight = inputs.weight, inputs.projection, inputs.depthwise_weight
    outputs = weight.shape[0], projection.shape[0]
    return [weight.numel(), projection.numel(), *outputs, depthwise_weight.numel(), depthwise_weight.shape[0]]


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes microseconds even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def flat_pixels(x: Tensor) -> Tensor:
    """`x` itself if one stride leads from each pixel to the next, else a copy of which that is true."""
    _, _, height, width = x.shape
    if height == 1 or width == 1 or x.stride(2) == width * x.stride(3):
        return x
    return x.contiguous(memory_format=memory_format(x))


def strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of image, channel and pixel of `flat_pixels(x)`."""
    return x.stride(0), x.stride(1), x.stride(2) if x.shape[3] == 1 else x.stride(3)


def stride_unit(*strides: int) -> int:
    """The largest number up to 16, the elements of a wide access, that divides all strides.

    Triton knows of an integer only whether 16 divides it, and channels are often 8 times something.
    """
    return math.gcd(16, *strides)
