"""The pointwise convolution with GELU as one operator for each direction; the backward is `BackwardPlan`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import definitions
from ..common.layout import flat_pixels, gradient_like, in_dtype, new_like, new_maps
from ..common.registration import DifferentiableOperator, Forward, Operator
from ..common.rules import accumulator
from .tiling import PointwiseTiling


class Inputs(NamedTuple):
    x: Tensor  # (N, I, H, W)
    weight: Tensor  # (O, I, 1, 1)
    bias: Tensor | None  # (O,)
    approximate: str
    keep_slope: bool  # for a backward


class ForwardPlan:
    """y (N, O, H, W) in the memory format of x; for the backward GELU's slope, like y, or empty without one."""

    def __init__(self, inputs: Inputs) -> None:
        x, weight, bias, approximate, keep_slope = inputs
        x = flat_pixels(x)
        y = new_maps(x, weight.shape[0])
        self.launch = PointwiseTiling(x, weight).forward(x, y, bias is not None, keep_slope, approximate)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        x, weight, bias, _, keep_slope = inputs
        x = flat_pixels(x)
        y, slope = _results(x, weight, keep_slope)
        if y.numel() > 0:
            self.launch(x, weight, bias, slope if keep_slope else None, y)
        return y, slope


def _results(x: Tensor, weight: Tensor, keep_slope: bool) -> tuple[Tensor, Tensor]:
    y = new_maps(x, weight.shape[0])
    return y, torch.empty_like(y) if keep_slope else y.new_empty(0)


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return _results(flat_pixels(inputs.x), inputs.weight, inputs.keep_slope)


class BackwardInputs(NamedTuple):
    grad: Tensor
    slope: Tensor
    x: Tensor
    weight: Tensor
    needs_x: bool
    needs_parameters: bool


class BackwardPlan:
    """The gradient of x, like x, and one vector of those of weight and bias; empty where not needed."""

    def __init__(self, inputs: BackwardInputs) -> None:
        x, grad = flat_pixels(inputs.x), flat_pixels(inputs.grad)
        tiling = PointwiseTiling(x, inputs.weight)
        self.backward_x = tiling.backward_x(grad, inputs.slope, new_like(x))
        self.backward_parameters = tiling.backward_parameters(grad, inputs.slope, x)

    def __call__(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        grad, slope, x, weight, needs_x, needs_parameters = inputs
        x, grad = flat_pixels(x), flat_pixels(grad)
        if grad.numel() == 0:
            grad_x, parameters = _gradients_like(x, weight, needs_x, needs_parameters)
            return grad_x.zero_(), parameters.zero_()
        # The gradient of the parameters comes with memory of its own.
        grad_x, parameters = _gradients_like(x, weight, needs_x, False)
        if needs_x:
            self.backward_x(grad, slope, weight, grad_x)
        if needs_parameters:
            parameters = self.backward_parameters(grad, slope, x)
        return grad_x, parameters


def _gradients_like(x: Tensor, weight: Tensor, needs_x: bool, needs_parameters: bool) -> tuple[Tensor, Tensor]:
    size = weight.numel() + weight.shape[0] if needs_parameters else 0
    return new_like(x) if needs_x else x.new_empty(0), x.new_empty(size, dtype=accumulator(weight))


def _fake_backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
    x = flat_pixels(inputs.x)
    return _gradients_like(x, inputs.weight, inputs.needs_x, inputs.needs_parameters)


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    needs_x, needs_weight, needs_bias, *_ = forward.needs
    x, weight, *_ = forward.inputs
    (slope,) = forward.kept
    inputs = BackwardInputs(grad, slope, x, weight, needs_x, needs_weight or needs_bias)
    grad_x, parameters = pointwise_conv_gelu_backward(inputs, forward)
    matrix, bias = in_dtype(parameters, weight.dtype).tensor_split([weight.numel()])
    return {
        "x": grad_x,
        "weight": gradient_like(weight, matrix) if needs_weight else None,
        "bias": bias if needs_bias else None,
    }


pointwise_conv_gelu_backward = Operator(
    "fastconv::pointwise_conv_gelu_backward", BackwardInputs, BackwardPlan, _fake_backward
)
pointwise_conv_gelu = DifferentiableOperator(
    "fastconv::pointwise_conv_gelu", Inputs, ForwardPlan, _fake, definitions.pointwise_conv_gelu, _gradients
)
