"""The depthwise convolution with layer norm over a tensor or its images, as a registered operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.launch import (
    flat_pixels,
    in_dtype,
    new_maps,
    strides,
)
from ..common.registration import DifferentiableOperator, Operator
from ..common.rules import check_differentiated_once
from ..layer_norm.operator import norm_of
from .plan import Depthwise


class DepthwiseForward:
    """y (N, K, H, W) in the memory format of x, and for the backward h [N, K, P] and its moments."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float) -> None:
        x = flat_pixels(x)
        depthwise = self.sizes = Depthwise(x, weight, norm)
        y, h, _ = _depthwise_results(x, weight, depthwise)
        self.depthwise = depthwise.forward(x, weight, bias is not None)
        self.collapse = depthwise.collapse_moments(depthwise.parts)
        self.normalise = norm_of(y, norm).normalise(_h_strides(h), self.collapse.parts, eps, y)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = flat_pixels(x)
        y, h, moments = _depthwise_results(x, weight, self.sizes)
        if x.numel() > 0:
            self.depthwise(x, weight, bias, h, moments)
            self.normalise(h, self.collapse(moments), y)
        return y, h, moments


def _h_strides(h: Tensor) -> tuple[int, int, int]:
    """Of image, channel and pixel."""
    return h.stride(0), h.stride(1), 1


def _depthwise_results(x: Tensor, weight: Tensor, depthwise: Depthwise) -> tuple[Tensor, Tensor, Tensor]:
    return new_maps(x, depthwise.outputs), depthwise.new_h(weight), depthwise.new_moments(weight)


def _fake_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = flat_pixels(x)
    return _depthwise_results(x, weight, Depthwise(x, weight, norm))


class DepthwiseBackward:
    """The gradient of x, like x, and one vector of those of weight and bias."""

    def __init__(
        self, grad: Tensor, x: Tensor, weight: Tensor, h: Tensor, moments: Tensor, norm: str, eps: float
    ) -> None:
        x, grad = flat_pixels(x), flat_pixels(grad)
        depthwise = Depthwise(x, weight, norm)
        norm_of_h = self.norm = norm_of(grad, norm)
        self.length = weight.numel() + weight.shape[0]
        self.collapse_moments = depthwise.collapse_moments(moments.shape[2])
        self.collapse_sums = norm_of_h.collapse_sums(norm_of_h.parts)
        moment_parts, sum_parts = self.collapse_moments.parts, self.collapse_sums.parts
        self.sums = norm_of_h.sums(grad, _h_strides(h), moment_parts, eps)
        self.depthwise = depthwise.backward(
            strides(grad), x, None, weight, torch.empty_like(x), moment_parts, sum_parts, eps
        )
        self.reduce = depthwise.reduce(1, 0, self.depthwise.partials)

    def __call__(
        self, grad: Tensor, x: Tensor, weight: Tensor, h: Tensor, moments: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        x, grad = flat_pixels(x), flat_pixels(grad)
        grad_x = torch.empty_like(x)
        if x.numel() == 0:
            return grad_x, moments.new_zeros(self.length)
        parameters = moments.new_empty(self.length)
        moments, sums = self.collapse_moments(moments), self.norm.new_sums(moments)
        self.sums(grad, h, moments, sums)
        sums = self.collapse_sums(sums)
        matrices, biases = self.depthwise(grad, h, x, None, weight, moments, sums, grad_x)
        self.reduce(moments.new_empty(1, 0), matrices, biases, parameters)
        return grad_x, parameters


def _fake_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, h: Tensor, moments: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(flat_pixels(x)), moments.new_empty(weight.numel() + weight.shape[0])


def _save_depthwise(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.set_materialize_grads(False)


def _depthwise_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    check_differentiated_once()
    weight = ctx.saved_tensors[1]
    grad_x, parameters = depthwise_conv_layer_norm_backward(grad, *ctx.saved_tensors, *ctx.options, forward=ctx)
    sizes = [weight.numel(), weight.shape[0]]
    taps, bias = torch.split_with_sizes(in_dtype(parameters, weight.dtype), sizes)
    return grad_x, taps.view_as(weight), bias if ctx.needs_input_grad[2] else None, None, None


depthwise_conv_layer_norm_backward = Operator(
    "fastconv::depthwise_conv_layer_norm_backward", DepthwiseBackward, _fake_depthwise_backward
)
depthwise_conv_layer_norm = DifferentiableOperator(
    "fastconv::depthwise_conv_layer_norm", DepthwiseForward, _fake_depthwise, _save_depthwise, _depthwise_gradients
)
