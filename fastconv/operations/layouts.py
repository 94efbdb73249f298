"""How results and gradients lie in memory for a caller: as those of PyTorch's own operations.

Implementations promise no more than that for contiguous maps the gradient is contiguous; else results and
gradients may lie as suits them, as in batch-last, images side by side. `dispatch` gives callers what `of` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv.kernels.common.rules import is_of_transform
from fastconv.kernels.common.values import Norm

# Elements from which a copy by tiles is faster: see bench/NOTES.md.
LEAST_TILED = 2**19

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def of(operation: str, x: Tensor, values: tuple[Any, ...]) -> tuple[torch.memory_format, torch.memory_format]:
    """The memory formats that PyTorch's own operations give the result, and the gradient of maps `x`.

    Composed as in `reference`, a norm of whole images is contiguous, that of each pixel channels_last, and a sum
    follows its first operand.
    """
    if operation == "layer_norm":
        normed = _of_norm(values[0])
        return normed, normed
    if operation == "convnext_block":
        _, pointwise, projection, norm, _ = values
        summed = _convolved(_convolved(_of_norm(norm), pointwise.weight), projection.weight)
        return summed, summed
    convolved = of_convolution(x, values[0].weight)
    if operation == "depthwise_conv_layer_norm":
        return _of_norm(values[1]), convolved
    return convolved, convolved


def of_convolution(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's result, and of the gradient of its maps `x`."""
    return _convolved(format_of(x), weight)


def _convolved(format: torch.memory_format, weight: Tensor) -> torch.memory_format:
    if weight.dtype == torch.float64:
        return CONTIGUOUS
    return format if format == CHANNELS_LAST else format_of(weight)


def _of_norm(norm: Norm) -> torch.memory_format:
    return CHANNELS_LAST if norm.over == "channel" else CONTIGUOUS


def format_of(x: Tensor) -> torch.memory_format:
    """What PyTorch's convolutions take maps or a weight for: by strides, also those of a view.

    Where there is one channel, or one pixel, `x.is_contiguous(memory_format=torch.channels_last)` is true of other
    strides, too.
    """
    by_image, by_channel, by_row, by_pixel = x.stride()
    if by_channel > by_pixel:
        # As of most; the shape takes the host as long as all that follows.
        return CONTIGUOUS
    _, channels, height, width = x.shape
    side_by_side = 0 < by_channel * max(1, channels) <= by_pixel
    if side_by_side and by_pixel * max(1, width) <= by_row and by_channel != by_row * max(1, height) <= by_image:
        return CHANNELS_LAST
    return CONTIGUOUS


def as_pytorch(y: Tensor, format: torch.memory_format) -> Tensor:
    """`y` in a memory format, or a copy of it."""
    if y.is_contiguous(memory_format=format):
        return y
    # PyTorch copies [rows, columns] to [columns, rows] by tiles, and more dimensions element by element.
    if format == CONTIGUOUS and y.numel() >= LEAST_TILED and y.permute(1, 2, 3, 0).is_contiguous():
        return y.permute(1, 2, 3, 0).flatten(0, 2).t().contiguous().view(y.shape)
    return y.contiguous(memory_format=format)


class WithLayout(torch.autograd.Function):
    """Maps as they are, whose gradient comes in a memory format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: torch.memory_format) -> Tensor:
        ctx.format = format
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad if is_of_transform(grad) else as_pytorch(grad, ctx.format), None


def with_gradient(x: Tensor, format: torch.memory_format) -> Tensor:
    """Maps `x`, whose gradient comes in a memory format. Implementations give contiguous maps a contiguous one."""
    if not torch.is_grad_enabled() or not x.requires_grad or (format == CONTIGUOUS and x.is_contiguous()):
        return x
    y: Tensor = WithLayout.apply(x, format)
    return y
