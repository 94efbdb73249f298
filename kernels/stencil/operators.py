"""The depthwise convolution on maps of any size, alone and with the norm of each pixel, as operators.

The backward of the convolution is `BackwardPlan`, that of both `NormBackwardPlan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..channel_norm.tiling import ChannelNormTiling
from ..common import definitions
from ..common.layout import flat_pixels, gradient_like, new_channels_last, new_maps
from ..common.registration import DifferentiableOperator, Forward, Operator
from ..common.rules import accumulator
from .layout import channels_side_by_side, in_format_of, taps_first
from .tiling import StencilTiling

# For the norm's backward on plain (NCHW) maps: if a program takes fewer pixels than these of each channel it loads
# more than it needs, because memory is read in sectors of 32 bytes. Such maps are copied to channels_last.
LEAST_ROWS_OF_PLAIN_MAPS = 8


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    weight: Tensor  # (K, 1, kh, kw)
    bias: Tensor | None  # (K,)


class ForwardPlan:
    """(N, K, H, W) in the memory format of x, by a sum over the taps."""

    def __init__(self, inputs: Inputs) -> None:
        source = channels_side_by_side(inputs.x)
        self.launch = StencilTiling(source, inputs.weight).forward(source, inputs.bias is not None)

    def __call__(self, inputs: Inputs) -> Tensor:
        x, weight, bias = inputs
        y = new_channels_last(x, weight.shape[0])
        if x.numel() > 0:
            self.launch(channels_side_by_side(x), taps_first(weight), bias, y)
        return in_format_of(x, y)


def _fake(inputs: Inputs) -> Tensor:
    return new_maps(inputs.x, inputs.weight.shape[0])


class BackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    weight: Tensor
    needs_x: bool
    needs_parameters: bool


class BackwardPlan:
    """The gradient of x, in its format, and of the taps and the bias, [kh * kw + 1, K]; empty where not needed."""

    def __init__(self, inputs: BackwardInputs) -> None:
        x, weight = inputs.x, inputs.weight
        source = channels_side_by_side(x)
        tiling = StencilTiling(source, weight)
        self.backward_x = tiling.backward_x(new_channels_last(x, weight.shape[0]), x.shape[1])
        self.backward_parameters = tiling.backward_parameters(source, accumulator(x))

    def __call__(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        grad, x, weight, needs_x, needs_parameters = inputs
        if x.numel() == 0:
            grad_x, parameters = _gradients_like(x, weight, needs_x, needs_parameters)
            return grad_x, parameters.zero_()
        # Each as large as all maps: nothing is allocated that is not written.
        grad_x, parameters = _gradients_like(x, weight, False, False)
        grad = grad.contiguous(memory_format=torch.channels_last)
        if needs_x:
            grad_source = new_channels_last(x, x.shape[1])
            self.backward_x(grad, taps_first(weight), None, grad_source)
            grad_x = in_format_of(x, grad_source)
        if needs_parameters:
            parameters = self.backward_parameters(grad, channels_side_by_side(x))
        return grad_x, parameters


def _gradients_like(x: Tensor, weight: Tensor, needs_x: bool, needs_parameters: bool) -> tuple[Tensor, Tensor]:
    rows = weight.shape[2] * weight.shape[3] + 1 if needs_parameters else 0
    parameters = x.new_empty(rows, weight.shape[0], dtype=accumulator(x))
    return new_maps(x, x.shape[1]) if needs_x else x.new_empty(0), parameters


def _fake_backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
    return _gradients_like(inputs.x, inputs.weight, inputs.needs_x, inputs.needs_parameters)


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    needs_x, needs_weight, needs_bias = forward.needs
    x, weight, _ = forward.inputs
    inputs = BackwardInputs(grad, x, weight, needs_x, needs_weight or needs_bias)
    grad_x, parameters = depthwise_conv_backward(inputs, forward)
    return {"x": grad_x, **_taps_and_bias(parameters, weight, needs_weight, needs_bias)}


def _taps_and_bias(
    parameters: Tensor, weight: Tensor, needs_weight: bool, needs_bias: bool
) -> dict[str, Tensor | None]:
    """The gradients of a weight, (K, 1, kh, kw), and a bias from [kh * kw + 1, K]."""
    return {
        "weight": gradient_like(weight, parameters[:-1].t().to(weight.dtype).contiguous())
        if needs_weight
        else None,
        "bias": parameters[-1].to(weight.dtype) if needs_bias else None,
    }


depthwise_conv_backward = Operator(
    "fastconv::depthwise_conv_backward", BackwardInputs, BackwardPlan, _fake_backward
)
depthwise_conv = DifferentiableOperator(
    "fastconv::depthwise_conv", Inputs, ForwardPlan, _fake, definitions.depthwise_conv, _gradients
)


class NormInputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    weight: Tensor  # (K, 1, kh, kw)
    bias: Tensor | None  # (K,)
    norm_weight: Tensor | None  # (K,)
    norm_bias: Tensor | None  # (K,)
    eps: float
    keep: bool  # the normalised tensor and the scales, for a backward

    @property
    def affine(self) -> bool:
        return self.norm_weight is not None or self.norm_bias is not None


class NormForwardPlan:
    """y (N, K, H, W), channels_last, and, to `keep` for the backward, or else empty:

    the normalised tensor, channels_last, empty too if y is that; and 1 / sqrt(variance + eps), [N * H * W].
    """

    def __init__(self, inputs: NormInputs) -> None:
        source = channels_side_by_side(inputs.x)
        self.launch = StencilTiling(source, inputs.weight).forward_norm(
            source,
            inputs.bias is not None,
            inputs.norm_weight is not None,
            inputs.norm_bias is not None,
            inputs.eps,
            inputs.keep and inputs.affine,
            inputs.keep,
        )

    def __call__(self, inputs: NormInputs) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, norm_weight, norm_bias, _, keep = inputs
        y = new_channels_last(x, weight.shape[0])
        normalised, scale = _new_kept(inputs)
        if x.numel() > 0:
            self.launch(
                channels_side_by_side(x),
                taps_first(weight),
                bias,
                norm_weight,
                norm_bias,
                y,
                normalised if keep and inputs.affine else None,
                scale if keep else None,
            )
        return y, normalised, scale


def _new_kept(inputs: NormInputs) -> tuple[Tensor, Tensor]:
    """What a forward keeps, uninitialised: the normalised tensor and the scales."""
    x, keep = inputs.x, inputs.keep
    normalised = new_channels_last(x, inputs.weight.shape[0]) if keep and inputs.affine else x.new_empty(0)
    return normalised, x.new_empty(x.shape[0] * x.shape[2] * x.shape[3] if keep else 0, dtype=accumulator(x))


def _fake_norm(inputs: NormInputs) -> tuple[Tensor, Tensor, Tensor]:
    return new_channels_last(inputs.x, inputs.weight.shape[0]), *_new_kept(inputs)


class NormBackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    weight: Tensor
    norm_weight: Tensor | None
    normalised: Tensor
    scale: Tensor
    needs_x: bool
    needs_parameters: bool
    needs_norm: bool

    def convolution(self, grad_h: Tensor) -> BackwardInputs:
        """The inputs of the convolution's backward, from the gradient of its result."""
        return BackwardInputs(grad_h, self.x, self.weight, self.needs_x, self.needs_parameters)


class NormBackwardPlan:
    """As `BackwardPlan`, and the gradients of the norm's weight and bias, [2, K], or empty."""

    def __init__(self, inputs: NormBackwardInputs) -> None:
        tiling = ChannelNormTiling(inputs.grad)
        self.permutes = tiling.rows < LEAST_ROWS_OF_PLAIN_MAPS
        grad_h = new_channels_last(inputs.x, inputs.weight.shape[0])
        self.norm = tiling.backward(
            self._source(inputs.grad),
            flat_pixels(inputs.normalised),
            grad_h,
            False,
            inputs.norm_weight is not None,
            inputs.needs_norm,
        )
        self.convolution = BackwardPlan(inputs.convolution(grad_h))

    def __call__(self, inputs: NormBackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
        grad, x, weight, norm_weight, normalised, scale, needs_x, needs_parameters, needs_norm = inputs
        if x.numel() == 0:
            grad_x, parameters = _gradients_like(x, weight, needs_x, needs_parameters)
            return grad_x, parameters.zero_(), _norm_gradients_like(x, weight, needs_norm).zero_()
        grad_h = new_channels_last(x, weight.shape[0])
        norm = self.norm(self._source(grad), flat_pixels(normalised), None, scale, norm_weight, grad_h)
        return *self.convolution(inputs.convolution(grad_h)), norm

    def _source(self, grad: Tensor) -> Tensor:
        return flat_pixels(grad.contiguous(memory_format=torch.channels_last) if self.permutes else grad)


def _norm_gradients_like(x: Tensor, weight: Tensor, needs_norm: bool) -> Tensor:
    return x.new_empty(2 if needs_norm else 0, weight.shape[0], dtype=accumulator(x))


def _fake_norm_backward(inputs: NormBackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _gradients_like(inputs.x, inputs.weight, inputs.needs_x, inputs.needs_parameters)
    return *gradients, _norm_gradients_like(inputs.x, inputs.weight, inputs.needs_norm)


def _keep(inputs: NormInputs, results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    y, normalised, scale = results
    return normalised if inputs.affine else y, scale


def _norm_gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    needs_x, needs_weight, needs_bias, needs_norm_weight, needs_norm_bias, *_ = forward.needs
    x, weight, _, norm_weight, norm_bias, *_ = forward.inputs
    normalised, scale = forward.kept
    inputs = NormBackwardInputs(
        grad,
        x,
        weight,
        norm_weight,
        normalised,
        scale,
        needs_x,
        needs_weight or needs_bias,
        needs_norm_weight or needs_norm_bias,
    )
    grad_x, parameters, norm = depthwise_conv_channel_norm_backward(inputs, forward)
    return {
        "x": grad_x,
        **_taps_and_bias(parameters, weight, needs_weight, needs_bias),
        "norm_weight": norm[0].to(norm_weight.dtype) if needs_norm_weight else None,
        "norm_bias": norm[1].to(norm_bias.dtype) if needs_norm_bias else None,
    }


depthwise_conv_channel_norm_backward = Operator(
    "fastconv::depthwise_conv_channel_norm_backward", NormBackwardInputs, NormBackwardPlan, _fake_norm_backward
)
depthwise_conv_channel_norm = DifferentiableOperator(
    "fastconv::depthwise_conv_channel_norm",
    NormInputs,
    NormForwardPlan,
    _fake_norm,
    definitions.depthwise_conv_channel_norm,
    _norm_gradients,
    _keep,
)
