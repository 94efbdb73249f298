"""The depthwise convolution with layer norm over a tensor or its images, as a registered operator.

The backward is `BackwardPlan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import definitions
from ..common.layout import flat_pixels, gradient_like, in_dtype, new_like, new_maps, strides
from ..common.registration import DifferentiableOperator, Forward, Operator
from ..layer_norm.tiling import LayerNormTiling
from .tiling import ToeplitzTiling


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    weight: Tensor  # (K, 1, kh, kw)
    bias: Tensor | None  # (K,)
    norm: str
    eps: float
    group: str | None


class ForwardPlan:
    """y (N, K, H, W) in the memory format of x, and for the backward h [N, K, P] and its moments.

    The moments are those of all ranks if a process group has parts of h.
    """

    def __init__(self, inputs: Inputs) -> None:
        x, weight, bias, norm, eps, group = inputs
        x = flat_pixels(x)
        self.tiling = ToeplitzTiling(x, weight, norm, group)
        y, h = _results(x, weight, self.tiling)
        self.convolve = self.tiling.forward(x, bias is not None)
        self.finish = self.tiling.finish_moments(self.tiling.parts)
        self.normalise = LayerNormTiling(y, norm).normalise(_h_strides(h), self.finish.parts, eps, y)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        x = flat_pixels(inputs.x)
        y, h = _results(x, inputs.weight, self.tiling)
        moments = self.tiling.new_moments(inputs.weight)
        if x.numel() == 0 and inputs.group is None:
            return y, h, moments
        if x.numel() > 0:
            self.convolve(x, inputs.weight, inputs.bias, h, moments)
        merged = self.finish(moments)
        if x.numel() > 0:
            self.normalise(h, merged, y)
        return y, h, moments if inputs.group is None else merged


def _h_strides(h: Tensor) -> tuple[int, int, int]:
    """The strides of image, channel and pixel."""
    return h.stride(0), h.stride(1), 1


def _results(x: Tensor, weight: Tensor, tiling: ToeplitzTiling) -> tuple[Tensor, Tensor]:
    return new_maps(x, tiling.outputs), tiling.new_h(weight)


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x = flat_pixels(inputs.x)
    tiling = ToeplitzTiling(x, inputs.weight, inputs.norm, inputs.group)
    return *_results(x, inputs.weight, tiling), tiling.new_kept_moments(inputs.weight)


class BackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    weight: Tensor
    h: Tensor
    moments: Tensor
    norm: str
    eps: float
    group: str | None


class BackwardPlan:
    """The gradient of x, like x, and one vector of those of weight and bias."""

    def __init__(self, inputs: BackwardInputs) -> None:
        grad, x, weight, h, moments, norm, eps, group = inputs
        x, grad = flat_pixels(x), flat_pixels(grad)
        tiling, self.norm = ToeplitzTiling(x, weight, norm), LayerNormTiling(grad, norm, group)
        self.length = sum(_gradient_sizes(weight))
        self.collapse_moments = tiling.collapse_moments(moments.shape[2])
        self.finish_sums = self.norm.finish_sums(self.norm.parts, h.numel())
        moment_parts, sum_parts = self.collapse_moments.parts, self.finish_sums.parts
        self.sums = self.norm.sums(grad, _h_strides(h), moment_parts, eps)
        self.convolve = tiling.backward(strides(grad), x, None, new_like(x), moment_parts, sum_parts, eps)
        self.reduce = tiling.reduce(1, 0, self.convolve.partials)

    def __call__(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        x, grad, h, moments = flat_pixels(inputs.x), flat_pixels(inputs.grad), inputs.h, inputs.moments
        grad_x, sums = new_like(x), self.norm.new_sums(moments)
        if x.numel() == 0:
            if inputs.group is not None:
                self.finish_sums(sums, moments)
            return grad_x, moments.new_zeros(self.length)
        parameters = moments.new_empty(self.length)
        moments = self.collapse_moments(moments)
        self.sums(grad, h, moments, sums)
        sums = self.finish_sums(sums, moments)
        matrices, biases = self.convolve(grad, h, x, None, inputs.weight, moments, sums, grad_x)
        self.reduce(moments.new_empty(1, 0), matrices, biases, parameters)
        return grad_x, parameters


def _gradient_sizes(weight: Tensor) -> list[int]:
    """The elements of the gradients of weight and bias."""
    return [weight.numel(), weight.shape[0]]


def _fake_backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
    parameters = inputs.moments.new_empty(sum(_gradient_sizes(inputs.weight)))
    return new_like(flat_pixels(inputs.x)), parameters


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    x, weight, _, *options = forward.inputs
    inputs = BackwardInputs(grad, x, weight, *forward.kept, *options)
    grad_x, parameters = depthwise_conv_layer_norm_backward(inputs, forward)
    taps, bias = torch.split_with_sizes(in_dtype(parameters, weight.dtype), _gradient_sizes(weight))
    _, _, needs_bias, *_ = forward.needs
    return {"x": grad_x, "weight": gradient_like(weight, taps), "bias": bias if needs_bias else None}


depthwise_conv_layer_norm_backward = Operator(
    "fastconv::depthwise_conv_layer_norm_backward", BackwardInputs, BackwardPlan, _fake_backward
)
depthwise_conv_layer_norm = DifferentiableOperator(
    "fastconv::depthwise_conv_layer_norm",
    Inputs,
    ForwardPlan,
    _fake,
    definitions.depthwise_conv_layer_norm,
    _gradients,
)
