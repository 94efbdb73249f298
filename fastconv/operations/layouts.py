"""How results and gradients lie in memory for a caller: as those of PyTorch's own operations.

Implementations promise no more than that for contiguous maps the gradient is contiguous; else results and
gradients may lie as suits them, as in batch-last, images side by side. `dispatch` gives callers what `of` says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastconv.kernels.common.rules import is_transformed
from fastconv.kernels.common.values import Norm

# Elements from which a copy by tiles is faster: see bench/NOTES.md.
LEAST_TILED = 2**19

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


class Layouts(NamedTuple):
    """The memory formats of an operation's result, and of the gradient of its maps."""

    result: torch.memory_format
    gradient: torch.memory_format


def of(operation: str, x: Tensor, values: tuple[Any, ...]) -> Layouts:
    """The layouts that PyTorch's own operations give, composed as in `reference`, for maps `x` and values.

    A norm of whole images is contiguous, that of each pixel channels_last, and a sum follows its first operand.
    """
    match operation:
        case "layer_norm":
            normed = _of_norm(values[0])
            return Layouts(normed, normed)
        case "convnext_block":
            _, pointwise, projection, norm, _ = values
            hidden = of_convolution(_of_norm(norm) == CHANNELS_LAST, pointwise.weight)
            summed = of_convolution(hidden == CHANNELS_LAST, projection.weight)
            return Layouts(summed, summed)
        case "depthwise_conv_layer_norm":
            convolution, norm = values
            return Layouts(_of_norm(norm), of_convolution(is_channels_last(x), convolution.weight))
        case _:
            convolved = of_convolution(is_channels_last(x), values[0].weight)
            return Layouts(convolved, convolved)


def _of_norm(norm: Norm) -> torch.memory_format:
    return CHANNELS_LAST if norm.over == "channel" else CONTIGUOUS


def of_convolution(channels_last: bool, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's result and of the gradient of its maps.

    Args:
        channels_last: whether the maps are.
    """
    if weight.dtype != torch.float64 and (channels_last or is_channels_last(weight)):
        return CHANNELS_LAST
    return CONTIGUOUS


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's convolutions take maps or a weight for channels_last: by strides, also those of a view.

    Where there is one channel, or one pixel, `x.is_contiguous(memory_format=torch.channels_last)` is true of other
    strides, too.
    """
    sizes, strides = x.shape, x.stride()
    least = 0
    if strides[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(1, sizes[dim])
    return True


def as_pytorch(y: Tensor, format: torch.memory_format) -> Tensor:
    """`y` in a memory format, or a copy of it."""
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
        return grad if is_transformed() else as_pytorch(grad, ctx.format), None
