"""Depthwise convolution and layer norm as one operation for each direction: `sources/depthwise_layer_norm.cpp`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from ..common import definitions
from ..common.layout import gradient_like
from ..common.registration import DifferentiableOperator, Forward, Operator
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
    "DepthwiseLayerNorm",
    integers="images channels outputs height width kernel_height kernel_width vectors slots "
    "over_sample contiguous",
    numbers="eps",
    pointers="x taps shift y h scale workspace gy gx gtaps gshift shared exchange",
)


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    weight: Tensor  # (K, 1, kh, kw)
    bias: Tensor | None  # (K,)
    norm: str
    eps: float
    group: str | None


class ForwardPlan:
    """y, contiguous if x is, else with images side by side.

    For the backward h [chunks, K, row], the scales, and all ranks' moments, if any.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.chunks = divide(inputs.x, inputs.weight)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        results = y, h, scale, moments = _results(inputs, self.chunks)
        if inputs.x.is_meta:
            return results
        with_ranks = exchange.of_moments(moments, inputs.group)
        if inputs.x.numel() > 0:
            x = batch_last(inputs.x)
            arguments = _arguments(x, inputs.weight, inputs.norm, h, scale, self.chunks)
            arguments.shift, arguments.eps = address(inputs.bias), inputs.eps
            arguments.contiguous, arguments.y = y.is_contiguous(), address(y)
            call("fastconv_depthwise_forward", arguments, with_ranks)
        elif with_ranks is not None:
            with_ranks.run_empty()
        return results


def _results(inputs: Inputs, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, outputs = inputs.x, inputs.weight.shape[0]
    row = (x.shape[2] * x.shape[3] + 1) * chunks.width
    h, scale = x.new_empty(chunks.count, outputs, row), x.new_empty(chunks.count, chunks.width)
    return new_maps(x, outputs), h, scale, exchange.new_moments(x, inputs.group)


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(inputs, divide(inputs.x, inputs.weight))


def _arguments(x: Tensor, weight: Tensor, norm: str, h: Tensor, scale: Tensor, chunks: Chunks) -> Any:
    """What both directions take, from maps x that lie as the kernels want them."""
    fields = depthwise_arguments(x, weight, norm, chunks)
    return _Arguments(**fields, h=address(h), scale=address(scale))


class BackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    weight: Tensor
    h: Tensor
    scale: Tensor
    moments: Tensor
    norm: str
    group: str | None
    needs_x: bool
    needs_weight: bool


class BackwardPlan:
    """The gradients of x and of the weight, each if needed, and of the bias."""

    def __init__(self, inputs: BackwardInputs) -> None:
        self.chunks = divide(inputs.x, inputs.weight)

    def __call__(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
        results = gx, weight, bias = _fake_backward(inputs)
        if inputs.x.is_meta:
            return results
        with_ranks = exchange.of_sums(inputs.moments, inputs.group)
        if inputs.x.numel() == 0:
            if with_ranks is not None:
                with_ranks.run_empty()
            return gx, weight.zero_(), bias.zero_()
        x = batch_last(inputs.x)
        contiguous = inputs.grad.is_contiguous()
        gy = inputs.grad if contiguous else batch_last(inputs.grad)
        h = aligned(inputs.h)
        arguments = _arguments(x, inputs.weight, inputs.norm, h, inputs.scale, self.chunks)
        arguments.contiguous, arguments.gy, arguments.gshift = contiguous, address(gy), address(bias)
        if inputs.needs_weight:
            arguments.gtaps = address(weight)
        with written_batch_last(gx) if inputs.needs_x else nullcontext() as maps:
            arguments.gx = address(maps)
            call("fastconv_depthwise_backward", arguments, with_ranks)
        return results


def _fake_backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = inputs.x, inputs.weight
    gx = new_maps(x, x.shape[1]) if inputs.needs_x else x.new_empty(0)
    return gx, x.new_empty(weight.numel() if inputs.needs_weight else 0), x.new_empty(weight.shape[0])


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    needs_x, needs_weight, needs_bias, *_ = forward.needs
    x, weight, _, norm, _, group = forward.inputs
    h, scale, moments = forward.kept
    inputs = BackwardInputs(grad, x, weight, h, scale, moments, norm, group, needs_x, needs_weight)
    gx, taps, bias = depthwise_conv_layer_norm_backward(inputs, forward)
    return {
        "x": gx if needs_x else None,
        "weight": gradient_like(weight, taps) if needs_weight else None,
        "bias": bias if needs_bias else None,
    }


depthwise_conv_layer_norm_backward = Operator(
    "fastconv::native_depthwise_conv_layer_norm_backward", BackwardInputs, BackwardPlan, _fake_backward
)
depthwise_conv_layer_norm = DifferentiableOperator(
    "fastconv::native_depthwise_conv_layer_norm",
    Inputs,
    ForwardPlan,
    _fake,
    definitions.depthwise_conv_layer_norm,
    _gradients,
)
