"""Maps as matrices: the memory layouts, and the two linear operations on them, of the portable path.

"Columns" are a [channels, A, B] view of a map in which A * B flattens without a copy, so that a pointwise
convolution is one matrix product of [out, in] with [in, A * B]. Two memory layouts allow it: batch-last
(A = pixels, B = images) and channels-last (A = images, B = pixels).

In batch-last a depthwise convolution is a matrix product per input channel: a [P, P] banded Toeplitz matrix of the
taps times the P pixels of each image, with the images of the batch as columns. Its input gradient is the product
with the transposed matrix, and its tap gradient is a product folded back onto the taps. Channels-last is what
PyTorch's own convolution is fastest in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Geometry(NamedTuple):
    """What turns columns back into maps: the map's sides, and which layout the columns are in.

    The backward takes the channels from here and not from a tensor's shape: torch.compile with dynamic shapes may
    read them from a stride that it wrongly assumes of the gradient.
    """

    channels: int
    height: int
    width: int
    batch_last: bool


def geometry_of(x: Tensor, batch_last: bool) -> Geometry:
    """The geometry of columns of maps (N, C, H, W)."""
    _, channels, height, width = x.shape
    return Geometry(channels, height, width, batch_last)


def to_columns(x: Tensor, geometry: Geometry) -> Tensor:
    """(N, C, H, W) -> [C, P, N] if batch-last, else [C, N, P]; a view if `x` is already laid out so."""
    if geometry.batch_last:
        return x.permute(1, 2, 3, 0).contiguous().flatten(1, 2)
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2).permute(2, 0, 1)


def from_columns(columns: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of `to_columns`, always a view."""
    if geometry.batch_last:
        return columns.unflatten(1, (geometry.height, geometry.width)).permute(3, 0, 1, 2)
    return columns.unflatten(2, (geometry.height, geometry.width)).permute(1, 0, 2, 3)


def in_memory_order(columns: Tensor, geometry: Geometry) -> Tensor:
    """The same columns with their dimensions as they lie in memory, contiguous: [C, P, N] or [N, P, C]."""
    return columns if geometry.batch_last else columns.permute(1, 2, 0)


def from_memory_order(x: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of `in_memory_order`; `x` may have any strides."""
    return x.contiguous() if geometry.batch_last else x.contiguous().permute(2, 0, 1)


def tap_index(height: int, width: int, kernel: torch.Size, device: torch.device) -> Tensor:
    """The tap that joins output pixel p to input pixel q, int64 [P * P] with q fastest.

    Pairs that no tap joins get one more than the last tap, where `toeplitz_matrix` keeps a zero.
    """
    kernel_height, kernel_width = kernel
    taps = torch.arange(kernel_height * kernel_width, device=device).view(kernel_height, kernel_width)
    # [2 * height - 1, 2 * width - 1], by the displacement from the output pixel: (0, 0) is in the middle.
    pad_height, pad_width = height - 1 - kernel_height // 2, width - 1 - kernel_width // 2
    taps = F.pad(taps, (pad_width, pad_width, pad_height, pad_height), value=kernel_height * kernel_width)
    # The window of the last output pixel comes first.
    return taps.unfold(0, height, 1).unfold(1, width, 1).flip((0, 1)).flatten()


def toeplitz_matrix(weight: Tensor, channels: int, geometry: Geometry) -> Tensor:
    """weight [K, 1, kh, kw] -> [C, M * P, P]: per input channel, the pixels of its M outputs from its own."""
    taps = F.pad(weight.flatten(1), (0, 1))
    index = tap_index(geometry.height, geometry.width, weight.shape[2:], weight.device)
    return taps.index_select(1, index).view(channels, -1, geometry.height * geometry.width)


def fold_onto_taps(matrix: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The transpose of `toeplitz_matrix`: sums the gradient of the matrix over the entries of each tap."""
    entries = matrix.reshape(weight.shape[0], -1)
    taps = entries.new_zeros(weight.shape[0], weight.shape[2] * weight.shape[3] + 1)
    index = tap_index(geometry.height, geometry.width, weight.shape[2:], weight.device)
    taps.index_add_(1, index, entries)
    # A gradient has the parameter's own strides, which DistributedDataParallel expects.
    return taps[:, :-1].reshape(weight.shape).contiguous()


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor | None]:
    """The depthwise convolution: [C, A, B] -> [K, A, B], newly written; and the Toeplitz matrix if used."""
    channels = x.shape[0]
    if not geometry.batch_last:
        y = F.conv2d(from_columns(x, geometry), weight, padding="same", groups=channels)
        return to_columns(y, geometry), None
    matrix = toeplitz_matrix(weight, channels, geometry)
    return torch.bmm(matrix, x).view(weight.shape[0], *x.shape[1:]), matrix


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    matrix: Tensor | None,
    geometry: Geometry,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `convolve`'s x and weight, those that are needed, from that of its columns."""
    if matrix is None:
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            from_columns(grad, geometry),
            from_columns(x, geometry),
            weight,
            None,
            stride=[1, 1],
            padding=[weight.shape[2] // 2, weight.shape[3] // 2],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=geometry.channels,
            output_mask=[needs_x, needs_weight, False],
        )
        if needs_weight:
            # PyTorch returns strides [49, 1, 7, 1], but a gradient needs the parameter's own, [49, 49, 7, 1].
            grad_weight = grad_weight.view(weight.shape)
        return (to_columns(grad_x, geometry) if needs_x else None), grad_weight
    grad_rows = grad.unflatten(0, (geometry.channels, -1)).flatten(1, 2)  # [C, M * P, N]
    grad_x = torch.bmm(matrix.transpose(1, 2), grad_rows) if needs_x else None
    grad_weight = None
    if needs_weight:
        grad_weight = fold_onto_taps(torch.bmm(grad_rows, x.transpose(1, 2)), weight, geometry)
    return grad_x, grad_weight


def mix_channels(weight: Tensor, columns: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """The pointwise convolution: weight [O, I] times columns [I, A, B] plus bias [O], in the same layout."""
    flat = columns.flatten(1)
    if geometry.batch_last:
        y = weight @ flat if bias is None else torch.addmm(bias[:, None], weight, flat)
    else:
        y = F.linear(flat.t(), weight, bias).t()
    return y.unflatten(1, columns.shape[1:])
