"""The portable path's operations on columns as autograd functions, each with its backward written by hand.

Inputs and gradients are maps. Results are columns in memory order, and not a view: one that a Function returns may
not be changed in place; and torch.compile expects gradients with the strides of the output, but hands over
contiguous ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.kernels.common.composition import (
    asks_for_more,
    composed_gradients,
    save,
    saved,
    without_autocast,
)
from fastconv.kernels.common.rules import gelu, gelu_backward
from fastconv.operations import reference
from fastconv.operations.columns import (
    convolve,
    convolve_backward,
    from_columns,
    from_memory_order,
    geometry_of,
    in_memory_order,
    mix_channels,
    to_columns,
    toeplitz_matrix,
)
from fastconv.operations.layouts import as_pytorch
from fastconv.operations.normalisation import (
    centre,
    mean_over,
    means_of_ranks,
    median,
    normalise_backward,
    normalised,
    statistics_dims,
)


def with_definition(definition: Callable[..., Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes of a backward of columns, inputs and kept tensors one of memory order.

    The gradient of maps, the first input, is contiguous if they are. The backward computes first derivatives;
    where more is asked, the operations of the definition do.

    Args:
        definition: takes and returns what the function does.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def call(ctx: Any, grad: Tensor) -> Any:
            inputs, kept = saved(ctx)
            if asks_for_more(grad):
                return composed_gradients(definition, inputs, ctx.needs_input_grad, grad)
            with torch.no_grad(), without_autocast(grad):
                grad_x, *others = backward(ctx, from_memory_order(grad, ctx.geometry), inputs, *kept)
                if grad_x is not None and inputs[0].is_contiguous():
                    grad_x = as_pytorch(grad_x, torch.contiguous_format)
                return grad_x, *others

        return call

    return decorate


def _composed_layer_norm(x: Tensor, norm: str, eps: float, group: str | None, batch_last: bool) -> Tensor:
    return _memory_order_of(reference.layer_norm(x, norm=norm, eps=eps, process_group=group), batch_last)


def _memory_order_of(maps: Tensor, batch_last: bool) -> Tensor:
    geometry = geometry_of(maps, batch_last)
    return in_memory_order(to_columns(maps, geometry), geometry)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, H, W)
        norm: str,
        eps: float,
        group: str | None,
        batch_last: bool,
    ) -> Tensor:
        geometry = geometry_of(x, batch_last)
        dims = statistics_dims(norm, geometry)
        columns = to_columns(x, geometry)
        level = median(columns, dims)
        h = columns - level
        scale, count = centre(h, None, dims, eps, geometry, group, level)
        ctx.geometry, ctx.dims = geometry, dims
        save(ctx, (x, norm, eps, group, batch_last), (h, scale, count))
        return normalised(h, scale, geometry)

    @staticmethod
    @with_definition(_composed_layer_norm)
    def backward(
        ctx: Any, grad: Tensor, inputs: Any, h: Tensor, scale: Tensor, count: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _, _, _, group, _ = inputs
        grad_x = normalise_backward(grad, h, scale, ctx.dims, group, count)
        return from_columns(grad_x, ctx.geometry), None, None, None, None


def _composed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding="same", groups=x.shape[1]).permute(0, 2, 3, 1)


class DepthwiseConv(torch.autograd.Function):
    """The convolution by itself, as a Toeplitz product: (N, C, H, W) -> (N, H, W, K)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, 1, kh, kw)
        bias: Tensor | None,  # (K,)
    ) -> Tensor:
        geometry = geometry_of(x, batch_last=True)
        columns = to_columns(x, geometry)
        h, _ = convolve(columns, weight, geometry)
        if bias is not None:
            h.add_(bias[:, None, None])
        ctx.geometry = geometry
        # Not the matrix, which may be larger than the maps.
        save(ctx, (x, weight, bias), (columns,))
        # [K, P, N] -> [P, N, K], which PyTorch copies by tiles, -> [N, P, K], which it copies by rows.
        by_pixel = h.flatten(1).t().contiguous().unflatten(0, h.shape[1:])
        return by_pixel.transpose(0, 1).contiguous().unflatten(1, x.shape[2:])

    @staticmethod
    @with_definition(_composed_convolution)
    def backward(ctx: Any, grad: Tensor, inputs: Any, columns: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, _ = inputs
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        matrix = toeplitz_matrix(weight, columns.shape[0], ctx.geometry)
        grad = to_columns(grad.permute(0, 3, 1, 2), ctx.geometry)
        grad_bias = grad.sum((1, 2)) if needs_bias else None
        grad_x, grad_weight = convolve_backward(grad, columns, weight, matrix, ctx.geometry, needs_x, needs_weight)
        return None if grad_x is None else from_columns(grad_x, ctx.geometry), grad_weight, grad_bias


def _composed_convolution_and_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float, group: str | None, batch_last: bool
) -> Tensor:
    y = reference.depthwise_conv_layer_norm(x, weight, bias, norm=norm, eps=eps, process_group=group)
    return _memory_order_of(y, batch_last)


class DepthwiseConvLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, 1, kh, kw)
        bias: Tensor | None,  # (K,)
        norm: str,
        eps: float,
        group: str | None,
        batch_last: bool,
    ) -> Tensor:
        geometry = geometry_of(x, batch_last)
        dims = statistics_dims(norm, geometry)
        columns = to_columns(x, geometry)
        h, matrix = convolve(columns, weight, geometry)
        scale, count = centre(h, bias, dims, eps, geometry, group)
        ctx.geometry, ctx.dims = geometry, dims
        save(ctx, (x, weight, bias, norm, eps, group, batch_last), (columns, matrix, h, scale, count))
        return normalised(h, scale, geometry)

    @staticmethod
    @with_definition(_composed_convolution_and_norm)
    def backward(
        ctx: Any,
        grad: Tensor,
        inputs: Any,
        columns: Tensor,
        matrix: Tensor | None,
        h: Tensor,
        scale: Tensor,
        count: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        _, weight, _, _, _, group, _ = inputs
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        geometry = ctx.geometry
        grad_h = normalise_backward(grad, h, scale, ctx.dims, group, count)
        grad_bias = grad_h.sum((1, 2)) if needs_bias else None
        grad_x, grad_weight = convolve_backward(grad_h, columns, weight, matrix, geometry, needs_x, needs_weight)
        grad_x = None if grad_x is None else from_columns(grad_x, geometry)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _composed_block(
    x: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    pointwise: Tensor,
    pointwise_bias: Tensor | None,
    projection: Tensor,
    projection_bias: Tensor | None,
    norm: str,
    eps: float,
    group: str | None,
    approximate: str,
    batch_last: bool,
) -> Tensor:
    y = reference.convnext_block(
        x,
        depthwise,
        depthwise_bias,
        pointwise[..., None, None],
        pointwise_bias,
        projection[..., None, None],
        projection_bias,
        norm=norm,
        eps=eps,
        process_group=group,
        approximate=approximate,
    )
    return _memory_order_of(y, batch_last)


class ConvNextBlock(torch.autograd.Function):
    """The whole block as one node, in which the normalised tensor, the widest, is never written."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, H, W)
        depthwise: Tensor,  # (K, 1, kh, kw)
        depthwise_bias: Tensor | None,  # (K,)
        pointwise: Tensor,  # (O, K)
        pointwise_bias: Tensor | None,  # (O,)
        projection: Tensor,  # (C, O)
        projection_bias: Tensor | None,  # (C,)
        norm: str,
        eps: float,
        group: str | None,
        approximate: str,
        batch_last: bool,
    ) -> Tensor:
        geometry = geometry_of(x, batch_last)
        dims = statistics_dims(norm, geometry)
        residual = to_columns(x, geometry)
        columns = residual.to(pointwise.dtype)
        h, matrix = convolve(columns, depthwise, geometry)
        scale, count = centre(h, depthwise_bias, dims, eps, geometry, group)
        product = mix_channels(pointwise, h, geometry)
        activation = gelu(scale_and_shift(product, scale, pointwise_bias), approximate)
        branch = mix_channels(projection, activation, geometry, projection_bias)
        ctx.geometry, ctx.dims, ctx.approximate = geometry, dims, approximate
        parameters = depthwise, depthwise_bias, pointwise, pointwise_bias, projection, projection_bias
        inputs = x, *parameters, norm, eps, group, approximate, batch_last
        save(ctx, inputs, (columns, matrix, h, scale, count, product, activation))
        return in_memory_order(residual, geometry) + in_memory_order(branch, geometry)

    @staticmethod
    @with_definition(_composed_block)
    def backward(
        ctx: Any,
        grad: Tensor,
        inputs: Any,
        columns: Tensor,
        matrix: Tensor | None,
        h: Tensor,
        scale: Tensor,
        count: Tensor | None,
        product: Tensor,
        activation: Tensor,
    ) -> tuple[Tensor | None, ...]:
        _, depthwise, _, pointwise, pointwise_bias, projection, _, _, _, group, _, _ = inputs
        needs_x, needs_depthwise, needs_depthwise_bias = ctx.needs_input_grad[:3]
        needs_pointwise, needs_pointwise_bias, needs_projection, needs_projection_bias = ctx.needs_input_grad[3:7]
        geometry, dims = ctx.geometry, ctx.dims
        grad_branch = grad.to(columns.dtype)
        grad_projection = grad_branch.flatten(1) @ activation.flatten(1).t() if needs_projection else None
        grad_projection_bias = grad_branch.sum((1, 2)) if needs_projection_bias else None
        grad_activation = mix_channels(projection.t(), grad_branch, geometry)
        z = scale_and_shift(product, scale, pointwise_bias)
        grad_z = gelu_backward(grad_activation, z, ctx.approximate)
        grad_pointwise_bias = grad_z.sum((1, 2)) if needs_pointwise_bias else None
        # The norm's backward needs the means over K channels of W^T dz and of x^ * (W^T dz). They are taken
        # on the narrow side of W, its O channels: sum_k (W^T dz)_k = sum_o dz_o sum_k W_ok, and
        # sum_k x^_k (W^T dz)_k = sum_o dz_o (W x^)_o.
        narrowing = pointwise.shape[0] / pointwise.shape[1]
        weight_sum = pointwise.sum(1, keepdim=True).t() / pointwise.shape[1]
        over_channels = mix_channels(weight_sum, grad_z, geometry)
        if count is None:
            mean = mean_over(over_channels, dims)
            slope = mean_over(grad_z * product, dims) * scale * narrowing
        else:
            total = over_channels.sum(dtype=torch.float64) * pointwise.shape[1]
            slopes = (grad_z * product).sum(dtype=torch.float64) * scale
            mean, slope = means_of_ranks(total, slopes, scale, group, count)
        grad_z.mul_(scale)
        grad_pointwise = grad_z.flatten(1) @ h.flatten(1).t() if needs_pointwise else None
        grad_x = grad_depthwise = grad_depthwise_bias = None
        if needs_x or needs_depthwise or needs_depthwise_bias:
            grad_h = mix_channels(pointwise.t(), grad_z, geometry)
            grad_h.sub_(scale * mean).addcmul_(h, scale.square() * slope, value=-1)
            if scale.numel() == h.numel() and count is None:
                # The norm of a single value is constant, and the difference is only rounding.
                grad_h.zero_()
            grad_depthwise_bias = grad_h.sum((1, 2)) if needs_depthwise_bias else None
            grad_x, grad_depthwise = convolve_backward(
                grad_h, columns, depthwise, matrix, geometry, needs_x, needs_depthwise
            )
        if grad_x is not None:
            grad_x = from_columns(grad_x + grad, geometry)
        grads = grad_x, grad_depthwise, grad_depthwise_bias, grad_pointwise, grad_pointwise_bias
        return *grads, grad_projection, grad_projection_bias, None, None, None, None, None


def scale_and_shift(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """W x^ + b from W h: one scale serves all the channels that W mixes, so W (scale h) = scale (W h)."""
    z = product * scale
    if bias is not None:
        z.add_(bias[:, None, None])
    return z
