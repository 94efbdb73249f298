"""The whole ConvNextBlock as one operator for each direction: two launches forward, three backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.launch import (
    Launch,
    block_size,
    ceil_div,
    flat_pixels,
    in_dtype,
    precision,
    strides,
)
from ..common.registration import DifferentiableOperator, Operator
from ..common.rules import accumulator, check_differentiated_once
from ..decisions import WIDEST_BLOCK
from ..toeplitz.plan import MAX_PARTIALS, Depthwise
from .kernels import pointwise_backward, pointwise_forward


class Rows:
    """How the pointwise kernels divide the pixels of the batch: a block is some pixels of some images."""

    def __init__(self, depthwise: Depthwise, hidden: int) -> None:
        # A program holds all hidden channels of its rows in registers, some times over.
        rows = max(16, min(64, 2048 // block_size(hidden, WIDEST_BLOCK)))
        self.warps = 4 if hidden <= 64 else 8
        self.block_pixels = min(depthwise.block_pixels, rows)
        self.pixel_blocks = ceil_div(depthwise.pixels, self.block_pixels)
        self.block_images = rows // self.block_pixels
        self.blocks = ceil_div(depthwise.images, self.block_images) * self.pixel_blocks


class Forward:
    """y like x, and for the backward: h [N, K, P], its moments, z [N, O, P]."""

    def __init__(
        self,
        x: Tensor,
        depthwise_weight: Tensor,
        depthwise_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        projection: Tensor,
        projection_bias: Tensor | None,
        norm: str,
        eps: float,
        approximate: str,
    ) -> None:
        x = flat_pixels(x)
        depthwise = self.sizes = Depthwise(x, depthwise_weight, norm)
        hidden = weight.shape[0]
        rows = Rows(depthwise, hidden)
        self.depthwise = depthwise.forward(x, depthwise_weight, depthwise_bias is not None)
        self.collapse = depthwise.collapse_moments(depthwise.parts)
        self.pointwise = Launch(
            pointwise_forward,
            rows.blocks,
            depthwise.images,
            self.collapse.parts,
            eps,
            *strides(x),
            *strides(torch.empty_like(x)),
            PIXELS=depthwise.pixels,
            INPUTS=depthwise.outputs,
            HIDDEN=hidden,
            CHANNELS=depthwise.channels,
            HAS_BIAS=bias is not None,
            HAS_PROJECTION_BIAS=projection_bias is not None,
            NORM=norm,
            APPROXIMATE=approximate,
            PRECISION=precision(weight),
            BLOCK_PARTS=depthwise.block_parts,
            BLOCK_IMAGES=rows.block_images,
            BLOCK_PIXELS=rows.block_pixels,
            BLOCK_INPUTS=block_size(depthwise.outputs, 64),
            BLOCK_HIDDEN=block_size(hidden, WIDEST_BLOCK),
            BLOCK_CHANNELS=block_size(depthwise.channels, WIDEST_BLOCK),
            num_warps=rows.warps,
        )

    def __call__(
        self,
        x: Tensor,
        depthwise_weight: Tensor,
        depthwise_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        projection: Tensor,
        projection_bias: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = flat_pixels(x)
        y, h, moments, z = _results(x, weight, self.sizes)
        if x.numel() > 0:
            self.depthwise(x, depthwise_weight, depthwise_bias, h, moments)
            merged = self.collapse(moments)
            self.pointwise(h, merged, x, weight, bias, projection, projection_bias, z, y)
        return y, h, moments, z


def _results(x: Tensor, weight: Tensor, depthwise: Depthwise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = weight.new_empty(depthwise.images, weight.shape[0], depthwise.pixels)
    return torch.empty_like(x), depthwise.new_h(weight), depthwise.new_moments(weight), z


def _fake(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor,
    projection_bias: Tensor | None,
    norm: str,
    eps: float,
    approximate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = flat_pixels(x)
    return _results(x, weight, Depthwise(x, depthwise_weight, norm))


class Backward:
    """The gradient of x, like x, and one vector of those of the parameters, in the order of `_sizes`."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        depthwise_weight: Tensor,
        weight: Tensor,
        projection: Tensor,
        h: Tensor,
        moments: Tensor,
        z: Tensor,
        norm: str,
        eps: float,
        approximate: str,
    ) -> None:
        x, grad = flat_pixels(x), flat_pixels(grad)
        grad_x = torch.empty_like(x)
        sizes = _sizes(depthwise_weight, weight, projection)
        depthwise = self.sizes = Depthwise(x, depthwise_weight, norm)
        hidden = weight.shape[0]
        rows = Rows(depthwise, hidden)
        rounds = max(1, ceil_div(rows.blocks, MAX_PARTIALS))
        self.length, self.columns = sum(sizes), (ceil_div(rows.blocks, rounds), sum(sizes[:4]))
        self.sum_parts = rows.blocks if norm == "tensor" else rows.pixel_blocks
        self.collapse_moments = depthwise.collapse_moments(moments.shape[2])
        self.collapse_sums = depthwise.collapse_sums(self.sum_parts)
        self.pointwise = Launch(
            pointwise_backward,
            self.columns[0],
            depthwise.images,
            rows.blocks,
            rounds,
            self.collapse_moments.parts,
            self.sum_parts,
            eps,
            *strides(grad),
            PIXELS=depthwise.pixels,
            INPUTS=depthwise.outputs,
            HIDDEN=hidden,
            CHANNELS=depthwise.channels,
            NORM=norm,
            APPROXIMATE=approximate,
            PRECISION=precision(weight),
            BLOCK_PARTS=depthwise.block_parts,
            BLOCK_IMAGES=rows.block_images,
            BLOCK_PIXELS=rows.block_pixels,
            BLOCK_INPUTS=16,
            BLOCK_HIDDEN=block_size(hidden, WIDEST_BLOCK),
            BLOCK_CHANNELS=block_size(depthwise.channels, WIDEST_BLOCK),
            num_warps=rows.warps,
        )
        self.depthwise = depthwise.backward(
            (h.stride(0), h.stride(1), 1),
            x,
            grad,
            depthwise_weight,
            grad_x,
            self.collapse_moments.parts,
            self.collapse_sums.parts,
            eps,
        )
        self.reduce = depthwise.reduce(*self.columns, self.depthwise.partials)

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        depthwise_weight: Tensor,
        weight: Tensor,
        projection: Tensor,
        h: Tensor,
        moments: Tensor,
        z: Tensor,
        *_: Any,
    ) -> tuple[Tensor, Tensor]:
        x, grad = flat_pixels(x), flat_pixels(grad)
        grad_x = torch.empty_like(x)
        if x.numel() == 0:
            return grad_x, moments.new_zeros(self.length)
        parameters = moments.new_empty(self.length)
        g = torch.empty_like(h)
        sums = moments.new_empty(self.sizes.groups, 2, self.sum_parts)
        columns = moments.new_empty(*self.columns)
        moments = self.collapse_moments(moments)
        self.pointwise(grad, h, moments, z, weight, projection, g, sums, columns)
        sums = self.collapse_sums(sums)
        matrices, biases = self.depthwise(g, h, x, grad, depthwise_weight, moments, sums, grad_x)
        self.reduce(columns, matrices, biases, parameters)
        return grad_x, parameters


def _sizes(depthwise_weight: Tensor, weight: Tensor, projection: Tensor) -> list[int]:
    """Of the gradients of weight, projection, bias, projection_bias, depthwise_weight, depthwise_bias."""
    return [
        weight.numel(),
        projection.numel(),
        weight.shape[0],
        projection.shape[0],
        depthwise_weight.numel(),
        depthwise_weight.shape[0],
    ]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    weight: Tensor,
    projection: Tensor,
    h: Tensor,
    moments: Tensor,
    z: Tensor,
    norm: str,
    eps: float,
    approximate: str,
) -> tuple[Tensor, Tensor]:
    size = sum(_sizes(depthwise_weight, weight, projection))
    return torch.empty_like(flat_pixels(x)), x.new_empty(size, dtype=accumulator(weight))


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, depthwise_weight, _, weight, _, projection, _, *ctx.options = inputs
    _, h, moments, z = output
    ctx.save_for_backward(x, depthwise_weight, weight, projection, h, moments, z)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    check_differentiated_once()
    x, depthwise_weight, weight, projection, h, moments, z = ctx.saved_tensors
    grad_x, parameters = convnext_block_backward(
        grad, x, depthwise_weight, weight, projection, h, moments, z, *ctx.options, forward=ctx
    )
    matrix, projection_matrix, bias, projection_bias, taps, depthwise_bias = torch.split_with_sizes(
        in_dtype(parameters, weight.dtype), _sizes(depthwise_weight, weight, projection)
    )
    # Autograd ignores those that nobody needs, except of an input that is None.
    needs = ctx.needs_input_grad
    return (
        grad_x,
        taps.view_as(depthwise_weight),
        depthwise_bias if needs[2] else None,
        matrix.view_as(weight),
        bias if needs[4] else None,
        projection_matrix.view_as(projection),
        projection_bias if needs[6] else None,
        None,
        None,
        None,
    )


convnext_block_backward = Operator("fastconv::convnext_block_backward", Backward, _fake_backward)
convnext_block = DifferentiableOperator("fastconv::convnext_block", Forward, _fake, _save, _gradients)
