"""The fused operations as PyTorch matrix products, for any device; on a CPU this is the fast path.

Two ideas carry the speed. On small maps convolutions are matrix products over "columns", in a memory layout that
travels with its tensor from operation to operation, as channels-last does in PyTorch: see `columns.py`.

And the norm folds into the pointwise convolution. With h the depthwise convolution's output less its mean, and
r = 1 / sqrt(mean(h^2) + eps), the normalised tensor is r h, and W (r h) = r (W h): it is never written.
Subtracting the mean before the product, rather than correcting after it, keeps the result accurate when the
mean is much larger than the standard deviation.

Half precision is computed in float32 and rounded once, at the end. Its range is too small for sums of gradients,
and processors without instructions for it take many times as long.

`decisions.py` says which form an operation takes, and `autograd.py` has the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.kernels.common.layout import with_own_strides
from fastconv.kernels.common.rules import accumulator, gelu
from fastconv.kernels.common.values import Convolution, Norm, map_tensors
from fastconv.operations import autograd, decisions, definition, reference
from fastconv.operations.columns import (
    Geometry,
    from_columns,
    from_memory_order,
    geometry_of,
    mix_channels,
    to_columns,
)
from fastconv.operations.decisions import Form
from fastconv.operations.layouts import WithLayout

HALVES = (torch.float16, torch.bfloat16)


def of_maps(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation of maps and values, in float32 if they are in half precision, with gradients like weights."""

    @functools.wraps(operation)
    def call(x: Tensor, *values: Any) -> Tensor:
        if torch.is_grad_enabled():
            values = tuple(_with_own_strides(each) if isinstance(each, Convolution) else each for each in values)
        first = values[0]
        computed_in = first.weight.dtype if isinstance(first, Convolution) else x.dtype
        if x.dtype not in HALVES and computed_in not in HALVES:
            return operation(x, *values)
        # A block adds to maps that may be wider than its weights.
        dtype = torch.promote_types(x.dtype, computed_in)
        return operation(_widened(x), *map_tensors(_widened, *values)).to(dtype)

    return call


def _with_own_strides(conv: Convolution, by_pytorch: bool = False) -> Convolution:
    return Convolution(with_own_strides(conv.weight, by_pytorch), conv.bias)


def _widened(x: Tensor) -> Tensor:
    return x.to(accumulator(x))


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    form = decisions.layer_norm(x, norm)
    if form == "pytorch channels last":
        # Half precision too: where means are large PyTorch's own gradients of it are better than those in float32.
        return definition.call("layer_norm", x, norm)
    return _layer_norm_of_columns(x, norm, form)


@of_maps
def _layer_norm_of_columns(x: Tensor, norm: Norm, form: Form) -> Tensor:
    batch_last = form == "batch last"
    y = autograd.LayerNorm.apply(x, norm.over, norm.eps, norm.group, batch_last)
    return norm.affine(_maps(x, y, batch_last))


@of_maps
def depthwise_conv_layer_norm(x: Tensor, depthwise: Convolution, norm: Norm) -> Tensor:
    form = decisions.depthwise_conv_layer_norm(x, depthwise, norm)
    match form:
        case "pytorch":
            depthwise = _with_own_strides(depthwise, by_pytorch=True)
            return definition.call("depthwise_conv_layer_norm", x, depthwise, norm)
        case "pytorch channels last" | "toeplitz channels last":
            return _convolve_and_norm_pixels(x, depthwise, norm, form).permute(0, 3, 1, 2)
        case "batch last" | "channels last":
            batch_last = form == "batch last"
            y = autograd.DepthwiseConvLayerNorm.apply(x, *depthwise, norm.over, norm.eps, norm.group, batch_last)
            return norm.affine(_maps(x, y, batch_last))


@of_maps
def convnext_block(
    x: Tensor,
    depthwise: Convolution,
    pointwise: Convolution,
    projection: Convolution,
    norm: Norm,
    approximate: str,
) -> Tensor:
    form = decisions.convnext_block(x, depthwise, norm)
    match form:
        case "pytorch":
            depthwise = _with_own_strides(depthwise, by_pytorch=True)
            values = depthwise, pointwise, projection, norm, approximate
            return definition.call("convnext_block", x, *values)
        case "pytorch channels last" | "toeplitz channels last":
            y = _convolve_and_norm_pixels(x.to(depthwise.weight.dtype), depthwise, norm, form)
            y = F.linear(gelu(F.linear(y, *_matrix(pointwise)), approximate), *_matrix(projection))
            return y.permute(0, 3, 1, 2) + x
        case "batch last" | "channels last":
            batch_last = form == "batch last"
            parameters = *depthwise, *_matrix(norm.fold_into(pointwise)), *_matrix(projection)
            y = autograd.ConvNextBlock.apply(
                x, *parameters, norm.over, norm.eps, norm.group, approximate, batch_last
            )
            return _maps(x, y, batch_last)


@of_maps
def pointwise_conv_gelu(x: Tensor, conv: Convolution, approximate: str) -> Tensor:
    form = decisions.pointwise_conv_gelu(x)
    if form == "pytorch":
        return reference.pointwise_conv_gelu(x, *conv, approximate=approximate)
    geometry = geometry_of(x, form == "batch last")
    columns = mix_channels(conv.weight.flatten(1), to_columns(x, geometry), geometry, conv.bias)
    # In this order the result is no view, of which FSDP warns.
    return gelu(from_columns(columns, geometry), approximate)


@of_maps
def patch_conv(x: Tensor, conv: Convolution) -> Tensor:
    images, channels, height, width = x.shape
    outputs, _, patch_height, patch_width = conv.weight.shape
    batch_last = decisions.patch_conv(x, conv) == "batch last"
    geometry = Geometry(outputs, height // patch_height, width // patch_width, batch_last)
    # What is left over beyond whole patches is ignored, as by a strided convolution.
    x = _with_contiguous_gradient(x)[:, :, : geometry.height * patch_height, : geometry.width * patch_width]
    rows, columns = (geometry.height, patch_height), (geometry.width, patch_width)
    patch_size, pixels = channels * patch_height * patch_width, geometry.height * geometry.width
    if batch_last:
        patches = x.permute(1, 2, 3, 0).unflatten(2, columns).unflatten(1, rows)  # [C, H, kh, W, kw, N]
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(patch_size, pixels, images)
    else:
        patches = x.permute(0, 2, 3, 1).unflatten(2, columns).unflatten(1, rows)  # [N, H, kh, W, kw, C]
        patches = patches.permute(0, 1, 3, 5, 2, 4).reshape(images, pixels, patch_size).permute(2, 0, 1)
    return from_columns(mix_channels(conv.weight.flatten(1), patches, geometry, conv.bias), geometry)


def _convolve_and_norm_pixels(x: Tensor, depthwise: Convolution, norm: Norm, form: Form) -> Tensor:
    """(N, C, H, W) -> (N, H, W, K), the layout in which PyTorch's own norm of each pixel is fastest."""
    if form == "toeplitz channels last":
        y = autograd.DepthwiseConv.apply(x, *depthwise)
    else:
        x = _with_contiguous_gradient(x).contiguous(memory_format=torch.channels_last)
        weight, bias = _with_own_strides(depthwise, by_pytorch=True)
        y = F.conv2d(x, weight, bias, padding="same", groups=x.shape[1]).permute(0, 2, 3, 1)
    return _norm_pixels(y, norm)


def _with_contiguous_gradient(x: Tensor) -> Tensor:
    """Maps `x`, whose gradient is contiguous if they are."""
    if torch.is_grad_enabled() and x.requires_grad and x.is_contiguous():
        return WithLayout.apply(x, torch.contiguous_format)
    return x


def _matrix(pointwise: Convolution) -> tuple[Tensor, Tensor | None]:
    """A pointwise convolution as a matrix (outputs, inputs), and its bias."""
    return pointwise.weight.flatten(1), pointwise.bias


def _norm_pixels(x: Tensor, norm: Norm) -> Tensor:
    """The norm "channel" of maps (N, H, W, C), in which it is PyTorch's layer norm."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _maps(x: Tensor, y: Tensor, batch_last: bool) -> Tensor:
    """Maps (N, K, H, W) from columns y of maps `x` that an autograd function returned, as they lie."""
    geometry = geometry_of(x, batch_last)
    return from_columns(from_memory_order(y, geometry), geometry)
