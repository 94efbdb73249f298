"""The whole ConvNextBlock as one operation for each direction: `sources/block.cpp`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import definitions
from ..common.layout import block_gradient_sizes, gradient_like
from ..common.registration import DifferentiableOperator, Forward, Operator
from ..common.values import APPROXIMATIONS
from . import exchange
from .chunks import (
    Chunks,
    address,
    aligned,
    batch_last,
    call,
    depthwise_arguments,
    divide,
    new_maps,
    structure,
    written_batch_last,
)

_Arguments = structure(
    "Block",
    integers="images channels outputs hidden height width kernel_height kernel_width vectors slots "
    "over_sample tanh",
    numbers="eps",
    pointers="x taps shift w bias projection offset y h product scale workspace "
    "gy gx gtaps gshift gw gbias gprojection goffset shared exchange",
)


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    depthwise_weight: Tensor  # (K, 1, kh, kw)
    depthwise_bias: Tensor | None  # (K,)
    weight: Tensor  # (O, K, 1, 1)
    bias: Tensor | None  # (O,)
    projection: Tensor  # (C, O, 1, 1)
    projection_bias: Tensor | None  # (C,)
    norm: str
    eps: float
    group: str | None
    approximate: str
    keep: bool  # what the backward needs


class ForwardPlan:
    """y; for the backward h [chunks, K, row], W h [chunks, O, row], the scales, and all ranks' moments, if any."""

    def __init__(self, inputs: Inputs) -> None:
        self.chunks = divide(inputs.x, inputs.depthwise_weight)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        results = y, *saved, moments = _results(inputs, self.chunks)
        if inputs.x.is_meta:
            return results
        with_ranks = exchange.of_moments(moments, inputs.group)
        if inputs.x.numel() > 0:
            x = batch_last(inputs.x)
            arguments = _arguments(x, inputs, self.chunks)
            _, _, shift, _, bias, _, offset, *_ = inputs
            arguments.shift, arguments.bias, arguments.offset = address(shift), address(bias), address(offset)
            if inputs.keep:
                arguments.h, arguments.product, arguments.scale = map(address, saved)
            with written_batch_last(y) as maps:
                arguments.y = address(maps)
                call("fastconv_block_forward", arguments, with_ranks)
        elif with_ranks is not None:
            with_ranks.run_empty()
        return results


def _results(inputs: Inputs, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, outputs, hidden = inputs.x, inputs.depthwise_weight.shape[0], inputs.weight.shape[0]
    _, channels, height, width = x.shape
    count = chunks.count if inputs.keep else 0
    row = (height * width + 1) * chunks.width
    shapes = (count, outputs, row), (count, hidden, row), (count, chunks.width)
    h, product, scale = map(x.new_empty, shapes)
    return new_maps(x, channels), h, product, scale, exchange.new_moments(x, inputs.group)


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _results(inputs, divide(inputs.x, inputs.depthwise_weight))


def _arguments(x: Tensor, inputs: Any, chunks: Chunks) -> Any:
    """What both directions take, from maps x that lie as the kernels want them."""
    return _Arguments(
        **depthwise_arguments(x, inputs.depthwise_weight, inputs.norm, chunks),
        hidden=inputs.weight.shape[0],
        tanh=APPROXIMATIONS.index(inputs.approximate),
        eps=inputs.eps,
        w=address(inputs.weight),
        projection=address(inputs.projection),
    )


class BackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    depthwise_weight: Tensor
    weight: Tensor
    bias: Tensor | None
    projection: Tensor
    h: Tensor
    product: Tensor
    scale: Tensor
    moments: Tensor
    norm: str
    eps: float
    group: str | None
    approximate: str
    needs_x: bool
    needs_depthwise: bool


class BackwardPlan:
    """The gradient of x, if needed, and a vector of the parameters', in the order of `block_gradient_sizes`.

    Without `needs_depthwise` those of the depthwise convolution are undefined.
    """

    def __init__(self, inputs: BackwardInputs) -> None:
        self.chunks = divide(inputs.x, inputs.depthwise_weight)
        self.sizes = block_gradient_sizes(inputs)

    def __call__(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        gx, parameters = _fake_backward(inputs)
        if inputs.x.is_meta:
            return gx, parameters
        with_ranks = exchange.of_sums(inputs.moments, inputs.group)
        if inputs.x.numel() == 0:
            if with_ranks is not None:
                with_ranks.run_empty()
            return gx, parameters.zero_()
        x, gy = batch_last(inputs.x), batch_last(inputs.grad)
        arguments = _arguments(x, inputs, self.chunks)
        arguments.bias, arguments.gy = address(inputs.bias), address(gy)
        h, product = aligned(inputs.h), aligned(inputs.product)
        arguments.h, arguments.product, arguments.scale = map(address, (h, product, inputs.scale))
        gw, gprojection, gbias, goffset, gtaps, gshift = map(address, parameters.split_with_sizes(self.sizes))
        arguments.gw, arguments.gprojection, arguments.gbias, arguments.goffset = gw, gprojection, gbias, goffset
        if inputs.needs_depthwise:
            arguments.gtaps, arguments.gshift = gtaps, gshift
        with written_batch_last(gx) if inputs.needs_x else nullcontext() as maps:
            arguments.gx = address(maps)
            call("fastconv_block_backward", arguments, with_ranks)
        return gx, parameters


def _fake_backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
    x = inputs.x
    gx = new_maps(x, x.shape[1]) if inputs.needs_x else x.new_empty(0)
    return gx, x.new_empty(sum(block_gradient_sizes(inputs)))


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    needs_x, needs_weight, needs_shift, _, needs_bias, _, needs_offset, *_ = forward.needs
    x, depthwise_weight, _, weight, bias, projection, _, *options, _ = forward.inputs
    saved = x, depthwise_weight, weight, bias, projection, *forward.kept, *options
    inputs = BackwardInputs(grad, *[*saved, needs_x, needs_weight or needs_shift])
    gx, parameters = convnext_block_backward(inputs, forward)
    parts = torch.split_with_sizes(parameters, block_gradient_sizes(inputs))
    gw, gprojection, gbias, goffset, taps, shift = parts
    return {
        "x": gx if needs_x else None,
        "depthwise_weight": gradient_like(depthwise_weight, taps),
        "depthwise_bias": shift if needs_shift else None,
        "weight": gradient_like(weight, gw),
        "bias": gbias if needs_bias else None,
        "projection": gradient_like(projection, gprojection),
        "projection_bias": goffset if needs_offset else None,
    }


convnext_block_backward = Operator(
    "fastconv::native_convnext_block_backward", BackwardInputs, BackwardPlan, _fake_backward
)
convnext_block = DifferentiableOperator(
    "fastconv::native_convnext_block", Inputs, ForwardPlan, _fake, definitions.convnext_block, _gradients
)
