"""Layer norm over the channels of each pixel as an operator; its backward is `BackwardPlan`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..common import definitions
from ..common.layout import flat_pixels, new_channels_last, new_like
from ..common.registration import DifferentiableOperator, Forward, Operator
from ..common.rules import accumulator
from .tiling import ChannelNormTiling


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    eps: float


class ForwardPlan:
    """y, channels_last, and for the backward of each pixel the mean and 1 / sqrt(variance + eps), [2, N * P]."""

    def __init__(self, inputs: Inputs) -> None:
        x, weight, bias, eps = inputs
        x = flat_pixels(x)
        self.tiling = ChannelNormTiling(x)
        self.launch = self.tiling.forward(
            x, new_channels_last(x, x.shape[1]), weight is not None, bias is not None, eps
        )

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        x = flat_pixels(inputs.x)
        y, statistics = new_channels_last(x, x.shape[1]), self.tiling.new_statistics(x)
        if x.numel() > 0:
            self.launch(x, inputs.weight, inputs.bias, y, statistics[0], statistics[1])
        return y, statistics


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x = flat_pixels(inputs.x)
    return new_channels_last(x, x.shape[1]), ChannelNormTiling(x).new_statistics(x)


class BackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    statistics: Tensor
    weight: Tensor | None
    needs_parameters: bool


class BackwardPlan:
    """The gradient of x, like x, and of weight and bias, [2, C], or empty."""

    def __init__(self, inputs: BackwardInputs) -> None:
        grad, x, _, weight, needs_parameters = inputs
        x, grad = flat_pixels(x), flat_pixels(grad)
        self.backward = ChannelNormTiling(x).backward(
            grad, x, new_like(x), True, weight is not None, needs_parameters
        )

    def __call__(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        grad, x, statistics, weight, needs_parameters = inputs
        x, grad = flat_pixels(x), flat_pixels(grad)
        grad_x = new_like(x)
        if x.numel() == 0:
            return grad_x, _parameters_like(x, needs_parameters).zero_()
        return grad_x, self.backward(grad, x, statistics[0], statistics[1], weight, grad_x)


def _parameters_like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(2 if needed else 0, x.shape[1], dtype=accumulator(x))


def _fake_backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
    x = flat_pixels(inputs.x)
    return new_like(x), _parameters_like(x, inputs.needs_parameters)


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    _, needs_weight, needs_bias, _ = forward.needs
    x, weight, bias, _ = forward.inputs
    (statistics,) = forward.kept
    inputs = BackwardInputs(grad, x, statistics, weight, needs_weight or needs_bias)
    grad_x, parameters = channel_layer_norm_backward(inputs, forward)
    return {
        "x": grad_x,
        "weight": parameters[0].to(weight.dtype) if needs_weight else None,
        "bias": parameters[1].to(bias.dtype) if needs_bias else None,
    }


channel_layer_norm_backward = Operator(
    "fastconv::channel_norm_backward", BackwardInputs, BackwardPlan, _fake_backward
)
channel_layer_norm = DifferentiableOperator(
    "fastconv::channel_norm", Inputs, ForwardPlan, _fake, definitions.channel_norm, _gradients
)
