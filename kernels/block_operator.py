"""The whole ConvNextBlock as one registered operator for each direction: two launches forward, three backward.

Registered operators are opaque to torch.compile and torch.export, which see the shapes of their results and the
operator that computes their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .block import pointwise_backward, pointwise_forward
from .convolution import MAX_PARTIALS, Depthwise
from .launch import (
    accumulator,
    block_size,
    ceil_div,
    check_differentiated_once,
    flat_pixels,
    launch,
    precision,
    strides,
)

# Hidden channels, or channels. More do not fit the registers and the shared memory of one program.
WIDEST = 128


class Rows:
    """How the pointwise kernels divide the pixels of the batch: a block is some pixels of some images."""

    def __init__(self, depthwise: Depthwise, hidden: int) -> None:
        # A program holds all hidden channels of its rows in registers, some times over.
        rows = max(16, min(64, 2048 // block_size(hidden, WIDEST)))
        self.warps = 4 if hidden <= 64 else 8
        self.block_pixels = min(depthwise.block_pixels, rows)
        self.pixel_blocks = ceil_div(depthwise.pixels, self.block_pixels)
        self.block_images = rows // self.block_pixels
        self.blocks = ceil_div(depthwise.images, self.block_images) * self.pixel_blocks


@torch.library.custom_op("fastconv::convnext_block", mutates_args=())
def convnext_block(
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
    """y like x, and for the backward: h [N, K, P], its moments, z [N, O, P]."""
    x = flat_pixels(x)
    y, h, moments, z = _results(x, depthwise_weight, weight, norm)
    if x.numel() == 0:
        return y, h, moments, z
    depthwise = Depthwise(x, depthwise_weight, norm)
    hidden = weight.shape[0]
    rows = Rows(depthwise, hidden)
    depthwise.forward(x, depthwise_weight, depthwise_bias, h, moments)
    merged = depthwise.collapse_moments(moments)
    launch(
        pointwise_forward,
        rows.blocks,
        h,
        merged,
        x,
        weight,
        bias,
        projection,
        projection_bias,
        z,
        y,
        depthwise.images,
        merged.shape[2],
        eps,
        *strides(x),
        *strides(y),
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
        BLOCK_HIDDEN=block_size(hidden, WIDEST),
        BLOCK_CHANNELS=block_size(depthwise.channels, WIDEST),
        num_warps=rows.warps,
    )
    return y, h, moments, z


def _results(
    x: Tensor, depthwise_weight: Tensor, weight: Tensor, norm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    depthwise = Depthwise(x, depthwise_weight, norm)
    z = weight.new_empty(depthwise.images, weight.shape[0], depthwise.pixels)
    return torch.empty_like(x), depthwise.new_h(weight), depthwise.new_moments(weight), z


@convnext_block.register_fake
def _(
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
    return _results(flat_pixels(x), depthwise_weight, weight, norm)


@torch.library.custom_op("fastconv::convnext_block_backward", mutates_args=())
def convnext_block_backward(
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
    """The gradient of x, like x, and one vector of those of the parameters, in the order of `_sizes`."""
    x, grad = flat_pixels(x), flat_pixels(grad)
    sizes = _sizes(depthwise_weight, weight, projection)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, x.new_zeros(sum(sizes), dtype=accumulator(weight))
    parameters = moments.new_empty(sum(sizes))
    depthwise = Depthwise(x, depthwise_weight, norm)
    hidden = weight.shape[0]
    rows = Rows(depthwise, hidden)
    rounds = ceil_div(rows.blocks, MAX_PARTIALS)
    programs = ceil_div(rows.blocks, rounds)
    g = torch.empty_like(h)
    sums = moments.new_empty(depthwise.groups, 2, rows.blocks if norm == "tensor" else rows.pixel_blocks)
    columns = moments.new_empty(programs, sum(sizes[:4]))
    moments = depthwise.collapse_moments(moments)
    launch(
        pointwise_backward,
        programs,
        grad,
        h,
        moments,
        z,
        weight,
        projection,
        g,
        sums,
        columns,
        depthwise.images,
        rows.blocks,
        rounds,
        moments.shape[2],
        sums.shape[2],
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
        BLOCK_HIDDEN=block_size(hidden, WIDEST),
        BLOCK_CHANNELS=block_size(depthwise.channels, WIDEST),
        num_warps=rows.warps,
    )
    sums = depthwise.collapse_sums(sums)
    matrices, biases = depthwise.backward(
        g, (h.stride(0), h.stride(1), 1), h, x, grad, depthwise_weight, moments, sums, eps, grad_x
    )
    depthwise.reduce(columns, matrices, biases, parameters)
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


@convnext_block_backward.register_fake
def _(
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
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
        grad, x, depthwise_weight, weight, projection, h, moments, z, *ctx.options
    )
    split = parameters.to(weight.dtype).split(_sizes(depthwise_weight, weight, projection))
    grads = (
        grad_x,
        split[4].view(depthwise_weight.shape),
        split[5],
        split[0].view(weight.shape),
        split[2],
        split[1].view(projection.shape),
        split[3],
    )
    needed = zip(grads, ctx.needs_input_grad, strict=False)
    return *(value if wanted else None for value, wanted in needed), None, None, None


convnext_block.register_autograd(_gradients, setup_context=_save)
