"""Layer norm of columns [K, A, B]: its statistics, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv.kernels.common.values import span
from fastconv.operations.columns import Geometry, in_memory_order


def statistics_dims(norm: str, geometry: Geometry) -> tuple[int, ...]:
    """The dimensions of columns [K, A, B] over which a norm takes its mean and variance."""
    images, pixels = (2, 1) if geometry.batch_last else (1, 2)
    # Where each dimension of maps (N, C, H, W) lies in columns.
    columns = images, 0, pixels, pixels
    return tuple(sorted({columns[dim] for dim in span(norm)}))


def mean_over(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.mean(dims, keepdim=True)


def mean_square(x: Tensor, dims: tuple[int, ...], geometry: Geometry) -> Tensor:
    """The mean of squares, keeping `dims`."""
    contiguous_dim = 2 if geometry.batch_last else 0
    if contiguous_dim in dims:
        # By rows: vector_norm squares and sums in one pass, but over a long row it loses digits (1e-5 in a
        # million elements), and along a dimension that is not contiguous it is slow.
        rows = torch.linalg.vector_norm(x, dim=contiguous_dim, keepdim=True)
        return mean_over(rows.square(), dims) / x.shape[contiguous_dim]
    return mean_over(x.square(), dims)


def centre(h: Tensor, bias: Tensor | None, dims: tuple[int, ...], eps: float, geometry: Geometry) -> Tensor:
    """Add the bias [K] and subtract the mean, in place; return 1 / sqrt(variance + eps), keeping `dims`."""
    # Every statistic is taken over all channels, so the mean of the bias is subtracted with that of h. Where the
    # mean is large so is the rounding of its sum; a second mean, of what the first leaves over, removes it.
    over_channels = mean_over(h, (0,))
    mean = mean_over(over_channels, dims)
    mean = mean + mean_over(over_channels - mean, dims)
    if bias is None:
        h.sub_(mean)
    else:
        bias = bias - bias.mean()
        h.add_((bias - bias.mean())[:, None, None] - mean)
    return (mean_square(h, dims, geometry) + eps).rsqrt()


def less_median(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A copy of x less the median of one pixel's channels, which leaves the norm as it is.

    The mean of equal values is not always that value: a last digit beside it would be all that is left over, and
    normalised. The median is, and no outlier, from which little would be left of the other values.
    """
    pixel = x[tuple(slice(1) if dim in dims and dim > 0 else slice(None) for dim in range(3))]
    middle = x.shape[0] // 2
    return x - pixel.sort(0).values[middle : middle + 1]


def normalised(h: Tensor, scale: Tensor, geometry: Geometry) -> Tensor:
    return in_memory_order(h, geometry) * in_memory_order(scale, geometry)


def normalise_backward(grad: Tensor, h: Tensor, scale: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The gradient of a layer norm's input: scale * (grad - mean(grad) - x^ * mean(grad * x^)), x^ = scale * h."""
    slope = mean_over(grad * h, dims) * scale.square()
    return (grad - mean_over(grad, dims)).addcmul_(h, slope, value=-1).mul_(scale)
