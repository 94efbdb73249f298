"""Layer norm of columns [K, A, B]: its statistics, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv.kernels.common import ranks
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


def centre(
    h: Tensor,
    bias: Tensor | None,
    dims: tuple[int, ...],
    eps: float,
    geometry: Geometry,
    group: str | None,
    level: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add the bias [K] and subtract the mean, in place.

    Args:
        group: the process group whose ranks each have a part of the columns, if any.
        level: what had been subtracted from the columns before, [1, A, B] or a part of it.

    Returns:
        1 / sqrt(variance + eps), keeping `dims`; and, of a group, how many values all its ranks have.
    """
    # Every statistic is taken over all channels, so the mean of the bias is subtracted with that of h. Where the
    # mean is large so is the rounding of its sum; a second mean, of what the first leaves over, removes it.
    over_channels = mean_over(h, (0,))
    mean = mean_over(over_channels, dims)
    mean = mean + mean_over(over_channels - mean, dims)
    if bias is None:
        h.sub_(mean)
    else:
        first = bias.mean()
        second = (bias - first).mean()
        h.add_((bias - first - second)[:, None, None] - mean)
        if group is not None:
            level = first.double() + second
    square = mean_square(h, dims, geometry)
    count = None
    if group is not None:
        moments = _moments(h, mean, square, level)
        count, merged_mean, squares = ranks.merge_moments(moments, group)
        h.add_((moments[1] - merged_mean).to(h.dtype))
        square = (squares / count).to(h.dtype).reshape(square.shape)
    return (square + eps).rsqrt(), count


def _moments(h: Tensor, mean: Tensor, square: Tensor, level: Tensor | None) -> Tensor:
    """Count, mean and M2 of this rank's values, float64 [3], from the mean square of h, their deviations."""
    values = h.numel()
    if values == 0:
        return h.new_zeros(3, dtype=torch.float64)
    whole = mean.double() if level is None else mean.double() + level
    return torch.stack([torch.full_like(whole, values), whole, square.double() * values]).flatten()


def median(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The median of one pixel's channels, which subtracted from x leaves its norm as it is.

    The mean of equal values is not always that value: a last digit beside it would be all that is left over, and
    normalised. The median is, and no outlier, from which little would be left of the other values.
    """
    pixel = x[tuple(slice(1) if dim in dims and dim > 0 else slice(None) for dim in range(3))]
    middle = x.shape[0] // 2
    return pixel.sort(0).values[middle : middle + 1]


def normalised(h: Tensor, scale: Tensor, geometry: Geometry) -> Tensor:
    return in_memory_order(h, geometry) * in_memory_order(scale, geometry)


def normalise_backward(
    grad: Tensor, h: Tensor, scale: Tensor, dims: tuple[int, ...], group: str | None, count: Tensor | None
) -> Tensor:
    """The gradient of a layer norm's input: scale * (grad - mean(grad) - x^ * mean(grad * x^)), x^ = scale * h."""
    if count is None:
        mean, slope = mean_over(grad, dims), mean_over(grad * h, dims) * scale
    else:
        product = (grad * h).sum(dtype=torch.float64) * scale
        mean, slope = means_of_ranks(grad.sum(dtype=torch.float64), product, scale, group, count)
    return (grad - mean).addcmul_(h, slope * scale, value=-1).mul_(scale)


def means_of_ranks(
    total: Tensor, product: Tensor, scale: Tensor, group: str | None, count: Tensor
) -> tuple[Tensor, Tensor]:
    """The means over all ranks of a group of the gradient of x^, and of its product with x^, each like `scale`.

    Args:
        total, product: the sums of this rank.
        count: how many values all ranks have.
    """
    assert group is not None
    means = (ranks.merge_sums(total, product.squeeze(), group) / count).to(scale.dtype)
    return means[0].expand_as(scale), means[1].expand_as(scale)
