"""The fused operations as PyTorch matrix products, for any device; on a CPU this is the fast path.

Two ideas carry the speed. On small maps convolutions are matrix products over "columns", in a memory layout that
travels with its tensor from operation to operation, as channels-last does in PyTorch: see `columns.py`.

And the norm folds into the pointwise convolution. With h the depthwise convolution's output less its mean, and
r = 1 / sqrt(mean(h^2) + eps), the normalised tensor is r h, and W (r h) = r (W h): it is never written.
Subtracting the mean before the product, rather than correcting after it, keeps the result accurate when the
mean is much larger than the standard deviation.

The signatures are those of `fastconv.reference`; `fastconv.functional` documents them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.kernels.common.rules import accumulator, check_differentiated_once
from fastconv.operations import reference
from fastconv.operations.columns import (
    Geometry,
    choose_geometry,
    convolve,
    convolve_backward,
    from_columns,
    from_memory_order,
    in_memory_order,
    mix_channels,
    restore_format,
    to_columns,
    toeplitz_matrix,
)

# Of a convolution's output, and of a block's widest maps: up to so many elements PyTorch's own operations, which
# are fewer, are faster in the same layout. A Toeplitz matrix pays only if it serves an image for each so many
# pixels. Measured: see bench/NOTES.md.
SMALL_CONVOLUTION = 2**16
SMALL_BLOCK = 2**15
MOST_TOEPLITZ_PIXELS_PER_IMAGE = 12
# Of depthwise convolutions with multiplier 1 in channels_last, in training: pixels up to which the Toeplitz matrix
# always pays; up to which it does if there are images enough; and pixels for each image.
CHANNELWISE_ALWAYS_PIXELS = 16
CHANNELWISE_MAX_PIXELS = 49
CHANNELWISE_PIXELS_PER_IMAGE = 3
# Of convolutions with norm that `swap` may leave to PyTorch: images from which its own of the smallest plain maps
# is slow, how many pixels these have, and elements from which in training its own of plain maps is.
SEVERAL_IMAGES = 8
SLOW_PIXELS = 4
SLOW_ELEMENTS = 2**16


def is_small(x: Tensor, weight: Tensor, size: int) -> bool:
    """Whether PyTorch's own operations are the faster way to convolve the maps `x`."""
    images, _, height, width = x.shape
    if choose_geometry(x.shape).batch_last:
        return height * width > MOST_TOEPLITZ_PIXELS_PER_IMAGE * images
    return images * weight.shape[0] * height * width <= size


def norms_in_channels_last(x: Tensor, weight: Tensor, norm: str) -> bool:
    """Whether the faster layout is channels_last, in which PyTorch's own norm of each pixel is fast."""
    return norm == "channel" and (weight.shape[0] == x.shape[1] or not choose_geometry(x.shape).batch_last)


def multiplies_channelwise(x: Tensor) -> bool:
    """Whether a Toeplitz matrix is the faster depthwise convolution of channels_last maps, with multiplier 1.

    PyTorch has fast kernels for it, but for its gradients on small maps, and for one pixel.
    """
    images, _, height, width = x.shape
    pixels = height * width
    if not torch.is_grad_enabled():
        return pixels == 1
    paid_for = pixels <= min(CHANNELWISE_MAX_PIXELS, CHANNELWISE_PIXELS_PER_IMAGE * images)
    return pixels <= CHANNELWISE_ALWAYS_PIXELS or paid_for


def swapping_pays(x: Tensor) -> bool:
    """Whether depthwise convolution + norm "channel" of `x` is faster here than PyTorch's operations, on a CPU.

    Other blocks than these take as long either way: PyTorch's channels_last maps are what ours become.
    """
    images, _, height, width = x.shape
    pixels = height * width
    plain = not x.is_contiguous(memory_format=torch.channels_last)
    if images >= SEVERAL_IMAGES and pixels <= (SLOW_PIXELS if plain else 1):
        return True
    if not plain or not torch.is_grad_enabled() or x.numel() < SLOW_ELEMENTS:
        return False
    return pixels > CHANNELWISE_MAX_PIXELS or multiplies_channelwise(x)


def statistics_dims(norm: str, geometry: Geometry) -> tuple[int, ...]:
    """The dimensions of columns [K, A, B] over which a norm takes its mean and variance."""
    if norm == "tensor":
        return (0, 1, 2)
    if norm == "sample":
        return (0, 1) if geometry.batch_last else (0, 2)
    return (0,)


def mean_over(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.mean(dims, keepdim=True, dtype=accumulator(x))


def mean_square(x: Tensor, dims: tuple[int, ...], geometry: Geometry) -> Tensor:
    """The mean of squares, keeping `dims`, in float32 or better."""
    contiguous_dim = 2 if geometry.batch_last else 0
    if contiguous_dim in dims:
        # By rows: vector_norm squares and sums in one pass, but over a long row it loses digits (1e-5 in a
        # million elements), and along a dimension that is not contiguous it is slow.
        rows = torch.linalg.vector_norm(x, dim=contiguous_dim, keepdim=True, dtype=accumulator(x))
        return mean_over(rows.square(), dims) / x.shape[contiguous_dim]
    return mean_over(x.to(accumulator(x)).square(), dims)


def centre(h: Tensor, bias: Tensor | None, dims: tuple[int, ...], eps: float, geometry: Geometry) -> Tensor:
    """Add the bias [K] and subtract the mean, in place; return 1 / sqrt(variance + eps), keeping `dims`."""
    # Every statistic spans all channels. Where the mean is large so is the rounding of its sum, and a second
    # mean, of what the first leaves over, takes it away.
    over_channels = mean_over(h, (0,))
    mean = mean_over(over_channels, dims)
    mean = mean + mean_over(over_channels - mean, dims)
    if bias is None:
        h.sub_(mean)
    else:
        bias = bias.to(mean.dtype)
        bias = bias - bias.mean()
        h.add_((bias - bias.mean())[:, None, None] - mean)
    return (mean_square(h, dims, geometry) + eps).rsqrt()


def normalised(h: Tensor, scale: Tensor, geometry: Geometry) -> Tensor:
    return (in_memory_order(h, geometry) * in_memory_order(scale, geometry)).to(h.dtype)


def normalise_backward(grad: Tensor, h: Tensor, scale: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The gradient of a layer norm's input: scale * (grad - mean(grad) - x^ * mean(grad * x^)), x^ = scale * h."""
    slope = mean_over(grad * h, dims) * scale.square()
    return (grad - mean_over(grad, dims)).addcmul_(h, slope, value=-1).mul_(scale)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of columns, without a derivative of its own, as one of memory order."""

    def call(ctx: Any, grad: Tensor) -> Any:
        check_differentiated_once()
        with torch.no_grad():
            return backward(ctx, from_memory_order(grad, ctx.geometry))

    return call


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: str, eps: float) -> Tensor:
        geometry = choose_geometry(x.shape)
        dims = statistics_dims(norm, geometry)
        h = to_columns(x, geometry).clone()
        scale = centre(h, None, dims, eps, geometry)
        ctx.geometry, ctx.dims = geometry, dims
        ctx.save_for_backward(h, scale)
        return normalised(h, scale, geometry)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, scale = ctx.saved_tensors
        grad_x = normalise_backward(grad, h, scale, ctx.dims)
        return from_columns(grad_x.to(grad.dtype), ctx.geometry), None, None


class _DepthwiseConv(torch.autograd.Function):
    """The convolution by itself, as a Toeplitz product: plain maps or any other to channels_last."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, 1, kh, kw)
        bias: Tensor | None,  # (K,)
    ) -> Tensor:
        geometry = choose_geometry(x.shape)._replace(batch_last=True)
        columns = to_columns(x, geometry)
        h, _ = convolve(columns, weight, geometry)
        if bias is not None:
            h.add_(bias[:, None, None])
        ctx.geometry = geometry
        # Not the matrix, which may be larger than the maps.
        ctx.save_for_backward(columns, weight)
        # [K, P, N] -> [P, N, K], which PyTorch copies by tiles, -> [N, P, K], which it copies by rows.
        by_pixel = h.flatten(1).t().contiguous().unflatten(0, h.shape[1:])
        return by_pixel.transpose(0, 1).contiguous().unflatten(1, x.shape[2:])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        matrix = toeplitz_matrix(weight, columns.shape[0], ctx.geometry)
        grad = to_columns(grad.permute(0, 3, 1, 2), ctx.geometry)
        grad_bias = grad.sum((1, 2)) if needs_bias else None
        grad_x, grad_weight = convolve_backward(grad, columns, weight, matrix, ctx.geometry, needs_x, needs_weight)
        return None if grad_x is None else from_columns(grad_x, ctx.geometry), grad_weight, grad_bias


class _DepthwiseConvLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, 1, kh, kw)
        bias: Tensor | None,  # (K,)
        norm: str,
        eps: float,
    ) -> Tensor:
        geometry = choose_geometry(x.shape)
        dims = statistics_dims(norm, geometry)
        columns = to_columns(x, geometry)
        h, matrix = convolve(columns, weight, geometry)
        scale = centre(h, bias, dims, eps, geometry)
        ctx.geometry, ctx.dims = geometry, dims
        ctx.save_for_backward(columns, weight, matrix, h, scale)
        return normalised(h, scale, geometry)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, weight, matrix, h, scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        geometry = ctx.geometry
        grad_h = normalise_backward(grad, h, scale, ctx.dims)
        grad_bias = grad_h.sum((1, 2)).to(weight.dtype) if needs_bias else None
        grad_h = grad_h.to(columns.dtype)
        grad_x, grad_weight = convolve_backward(grad_h, columns, weight, matrix, geometry, needs_x, needs_weight)
        return None if grad_x is None else from_columns(grad_x, geometry), grad_weight, grad_bias, None, None


class _ConvNextBlock(torch.autograd.Function):
    """The whole block as one node, in which the normalised tensor, the widest, is never written."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, H, W)
        depthwise_weight: Tensor,  # (K, 1, kh, kw)
        depthwise_bias: Tensor | None,  # (K,)
        weight: Tensor,  # (O, K)
        bias: Tensor | None,  # (O,)
        projection: Tensor,  # (C, O)
        projection_bias: Tensor | None,  # (C,)
        norm: str,
        eps: float,
        approximate: str,
    ) -> Tensor:
        geometry = choose_geometry(x.shape)
        dims = statistics_dims(norm, geometry)
        residual = to_columns(x, geometry)
        columns = residual.to(weight.dtype)
        h, matrix = convolve(columns, depthwise_weight, geometry)
        scale = centre(h, depthwise_bias, dims, eps, geometry)
        product = mix_channels(weight, h, geometry)
        activation = F.gelu(scale_and_shift(product, scale, bias), approximate=approximate)
        branch = mix_channels(projection, activation, geometry, projection_bias)
        ctx.geometry, ctx.dims, ctx.approximate = geometry, dims, approximate
        ctx.save_for_backward(
            columns, depthwise_weight, matrix, h, scale, weight, bias, product, activation, projection
        )
        return in_memory_order(residual, geometry) + in_memory_order(branch, geometry)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, depthwise_weight, matrix, h, scale, weight, bias, product, activation, projection = (
            ctx.saved_tensors
        )
        needs_x, needs_taps, needs_shift, needs_weight, needs_bias, needs_projection, needs_offset = (
            ctx.needs_input_grad[:7]
        )
        geometry, dims = ctx.geometry, ctx.dims
        grad_y = grad.to(columns.dtype)
        grad_projection = grad_y.flatten(1) @ activation.flatten(1).t() if needs_projection else None
        grad_offset = grad_y.sum((1, 2)) if needs_offset else None
        grad_z = torch.ops.aten.gelu_backward(
            mix_channels(projection.t(), grad_y, geometry),
            scale_and_shift(product, scale, bias),
            approximate=ctx.approximate,
        )
        grad_bias = grad_z.sum((1, 2)) if needs_bias else None
        # The norm's backward needs the means over K channels of W^T dz and of x^ * (W^T dz). They are taken
        # on the narrow side of W, its O channels: sum_k (W^T dz)_k = sum_o dz_o sum_k W_ok, and
        # sum_k x^_k (W^T dz)_k = sum_o dz_o (W x^)_o.
        narrowing = weight.shape[0] / weight.shape[1]
        weight_sum = weight.sum(1, keepdim=True).t() / weight.shape[1]
        mean = mean_over(mix_channels(weight_sum, grad_z, geometry), dims)
        slope = mean_over(grad_z * product, dims) * scale * narrowing
        grad_z.mul_(scale)
        grad_weight = grad_z.flatten(1) @ h.flatten(1).t() if needs_weight else None
        grad_x = grad_taps = grad_shift = None
        if needs_x or needs_taps or needs_shift:
            grad_h = mix_channels(weight.t(), grad_z, geometry).to(scale.dtype)
            grad_h.sub_(scale * mean).addcmul_(h, scale.square() * slope, value=-1)
            # A sum of terms that almost cancel, taken before they are rounded to half precision.
            grad_shift = grad_h.sum((1, 2)).to(h.dtype) if needs_shift else None
            grad_h = grad_h.to(h.dtype)
            grad_x, grad_taps = convolve_backward(
                grad_h, columns, depthwise_weight, matrix, geometry, needs_x, needs_taps
            )
        if grad_x is not None:
            grad_x = from_columns(grad_x + grad, geometry)
        grads = grad_x, grad_taps, grad_shift, grad_weight, grad_bias, grad_projection, grad_offset
        return *grads, None, None, None


def scale_and_shift(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """W x^ + b from W h: one scale serves all the channels that W mixes, so W (scale h) = scale (W h)."""
    z = product * scale
    if bias is not None:
        z.add_(bias[:, None, None])
    return z.to(product.dtype)


def layer_norm(
    x: Tensor,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    if norm == "channel":
        y = reference.layer_norm(x, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias)
        return restore_format(y, x)
    return _affine(_to_maps(_LayerNorm.apply(x, norm, eps), x), norm_weight, norm_bias)


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    if norms_in_channels_last(x, weight, norm):
        y = _depthwise_conv(x, weight, bias)
        y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
        return restore_format(y.permute(0, 3, 1, 2), x)
    if is_small(x, weight, SMALL_CONVOLUTION):
        y = reference.depthwise_conv_layer_norm(
            x, weight, bias, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias
        )
        return restore_format(y, x)
    y = _DepthwiseConvLayerNorm.apply(x, weight, bias, norm, eps)
    return _affine(_to_maps(y, x), norm_weight, norm_bias)


def _to_maps(y: Tensor, x: Tensor) -> Tensor:
    """Maps in the format of `x` from what a Function returned: columns in memory order, and not a view.

    A view that a Function returns may not be changed in place; and torch.compile expects gradients with the
    strides of the output, but hands over contiguous ones.
    """
    geometry = choose_geometry(x.shape)
    return restore_format(from_columns(from_memory_order(y, geometry), geometry), x)


def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, C, H, W) -> (N, H, W, K), in which PyTorch's own norm of each pixel is the fastest."""
    if weight.shape[0] == x.shape[1] and multiplies_channelwise(x):
        return _DepthwiseConv.apply(x, weight, bias)
    x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, padding="same", groups=x.shape[1]).permute(0, 2, 3, 1)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight[:, None, None]
    return x if bias is None else x + bias[:, None, None]


def pointwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    if x.is_contiguous():
        # To bring them into another layout, and back, takes longer than the product.
        return reference.pointwise_conv_gelu(x, weight, bias, approximate=approximate)
    geometry = choose_geometry(x.shape)
    if x.is_contiguous(memory_format=torch.channels_last):
        geometry = geometry._replace(batch_last=False)
    columns = mix_channels(weight.flatten(1), to_columns(x, geometry), geometry, bias)
    return restore_format(from_columns(F.gelu(columns, approximate=approximate), geometry), x)


def convnext_block(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    projection_weight: Tensor,
    projection_bias: Tensor | None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    approximate: str = "none",
) -> Tensor:
    if norms_in_channels_last(x, depthwise_weight, norm):
        y = _depthwise_conv(x.to(depthwise_weight.dtype), depthwise_weight, depthwise_bias)
        y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
        y = F.gelu(F.linear(y, pointwise_weight.flatten(1), pointwise_bias), approximate=approximate)
        y = F.linear(y, projection_weight.flatten(1), projection_bias)
        return restore_format(y.permute(0, 3, 1, 2) + x, x)
    if is_small(x, depthwise_weight, SMALL_BLOCK):
        y = reference.convnext_block(
            x,
            depthwise_weight,
            depthwise_bias,
            pointwise_weight,
            pointwise_bias,
            projection_weight,
            projection_bias,
            norm=norm,
            eps=eps,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            approximate=approximate,
        )
        return restore_format(y, x)
    # The norm's affine map goes into the pointwise convolution that follows: W (g x^ + s) + b.
    weight, bias = pointwise_weight.flatten(1), pointwise_bias
    if norm_bias is not None:
        shift = weight @ norm_bias
        bias = shift if bias is None else bias + shift
    if norm_weight is not None:
        weight = weight * norm_weight
    projection = projection_weight.flatten(1)
    y = _ConvNextBlock.apply(
        x,
        depthwise_weight,
        depthwise_bias,
        weight,
        bias,
        projection,
        projection_bias,
        norm,
        eps,
        approximate,
    )
    return _to_maps(y, x)


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    images, channels, height, width = x.shape
    patch_height, patch_width = weight.shape[2:]
    geometry = choose_geometry((images, weight.shape[0], height // patch_height, width // patch_width))
    # What is left over beyond whole patches is ignored, as by a strided convolution.
    x = x[:, :, : geometry.height * patch_height, : geometry.width * patch_width]
    rows, columns = (geometry.height, patch_height), (geometry.width, patch_width)
    patch_size, pixels = channels * patch_height * patch_width, geometry.height * geometry.width
    if geometry.batch_last:
        patches = x.permute(1, 2, 3, 0).unflatten(2, columns).unflatten(1, rows)  # [C, H, kh, W, kw, N]
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(patch_size, pixels, images)
    else:
        patches = x.permute(0, 2, 3, 1).unflatten(2, columns).unflatten(1, rows)  # [N, H, kh, W, kw, C]
        patches = patches.permute(0, 1, 3, 5, 2, 4).reshape(images, pixels, patch_size).permute(2, 0, 1)
    return from_columns(mix_channels(weight.flatten(1), patches, geometry, bias), geometry)
