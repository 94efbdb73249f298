"""Layer norm over the channels of each pixel as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.launch import (
    Launch,
    ceil_div,
    flat_pixels,
    next_power_of_2,
    stride_unit,
    strides,
)
from ..common.partials import SumPartials
from ..common.registration import DifferentiableOperator, Operator
from ..common.rules import accumulator, check_differentiated_once
from .kernels import channel_norm, channel_norm_backward

# Of the backward: as many as a large GPU runs at once, because each keeps partial sums.
PROGRAMS = 512


class ChannelNorm:
    """The sizes of maps whose pixels are normalised, and how the kernels divide the work."""

    def __init__(self, x: Tensor) -> None:
        self.images, self.channels = x.shape[:2]
        self.pixels = x.shape[2] * x.shape[3]
        self.block = next_power_of_2(self.channels)
        # About 2048 values, 16 to a thread.
        self.rows = max(1, 2048 // self.block)
        self.blocks = ceil_div(self.images * self.pixels, self.rows)
        self.options: dict[str, Any] = {
            "CHANNELS": self.channels,
            "BLOCK_ROWS": self.rows,
            "BLOCK_CHANNELS": self.block,
        }

    def new_statistics(self, x: Tensor) -> Tensor:
        """Of each pixel the mean, and 1 / sqrt(variance + eps): [2, N * P]."""
        return x.new_empty(2, self.images * self.pixels, dtype=accumulator(x))

    def forward(self, x: Tensor, y: Tensor, has_weight: bool, has_bias: bool, eps: float) -> Launch:
        """Of x, weight, bias, y, and each pixel's mean and scale; writes the last three."""
        unit, in_units = _strides_in_units(x, y)
        return Launch(
            channel_norm,
            self.blocks,
            self.images,
            self.pixels,
            eps,
            *in_units,
            STRIDE_UNIT=unit,
            HAS_WEIGHT=has_weight,
            HAS_BIAS=has_bias,
            **self.options,
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        grad_x: Tensor,
        has_mean: bool,
        has_weight: bool,
        needs_parameters: bool,
    ) -> ChannelNormBackward:
        """
        Args:
            x: what was normalised or, without a mean, the normalised tensor.
        """
        rounds = max(1, ceil_div(self.blocks, PROGRAMS))
        programs = ceil_div(self.blocks, rounds)
        unit, in_units = _strides_in_units(grad, x, grad_x)
        launch = Launch(
            channel_norm_backward,
            programs,
            self.images,
            self.pixels,
            rounds,
            *in_units,
            STRIDE_UNIT=unit,
            HAS_MEAN=has_mean,
            HAS_WEIGHT=has_weight,
            NEEDS_PARAMETERS=needs_parameters,
            **self.options,
        )
        return ChannelNormBackward(launch, programs, self.channels, needs_parameters)


class ChannelNormBackward:
    """Writes the gradient of what was normalised; returns those of weight and bias, [2, C], or [0, C]."""

    def __init__(self, launch: Launch, programs: int, channels: int, needs_parameters: bool) -> None:
        self._launch, self._needs_parameters = launch, needs_parameters
        self._size = programs, 2, channels
        self._sum = SumPartials(programs, 2 * channels)

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor | None,
        scale: Tensor,
        weight: Tensor | None,
        grad_x: Tensor,
    ) -> Tensor:
        partials = scale.new_empty(*self._size) if self._needs_parameters else None
        self._launch(grad, x, mean, scale, weight, grad_x, partials)
        return scale.new_empty(0, self._size[2]) if partials is None else self._sum(partials)


def _strides_in_units(*maps: Tensor) -> tuple[int, list[int]]:
    """A unit, and of each of `maps` the strides of image and pixel in it, and between them that of channel."""
    found = [strides(x) for x in maps]
    unit = stride_unit(*(stride for image, _, pixel in found for stride in (image, pixel)))
    return unit, [stride for image, channel, pixel in found for stride in (image // unit, channel, pixel // unit)]


class Forward:
    """y like x, and for the backward of each pixel the mean and 1 / sqrt(variance + eps), [2, N * P]."""

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        x = flat_pixels(x)
        sizes = self.sizes = ChannelNorm(x)
        self.launch = sizes.forward(x, torch.empty_like(x), weight is not None, bias is not None, eps)

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        x = flat_pixels(x)
        y, statistics = torch.empty_like(x), self.sizes.new_statistics(x)
        if x.numel() > 0:
            self.launch(x, weight, bias, y, statistics[0], statistics[1])
        return y, statistics


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    x = flat_pixels(x)
    return torch.empty_like(x), ChannelNorm(x).new_statistics(x)


class Backward:
    """The gradient of x, like x, and of weight and bias, [2, C], or empty."""

    def __init__(
        self, grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, needs_parameters: bool
    ) -> None:
        x, grad = flat_pixels(x), flat_pixels(grad)
        grad_x = torch.empty_like(x)
        self.backward = ChannelNorm(x).backward(grad, x, grad_x, True, weight is not None, needs_parameters)

    def __call__(
        self, grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, needs_parameters: bool
    ) -> tuple[Tensor, Tensor]:
        x, grad = flat_pixels(x), flat_pixels(grad)
        grad_x = torch.empty_like(x)
        if x.numel() == 0:
            return grad_x, _parameters_like(x, needs_parameters).zero_()
        return grad_x, self.backward(grad, x, statistics[0], statistics[1], weight, grad_x)


def _parameters_like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(2 if needed else 0, x.shape[1], dtype=accumulator(x))


def _fake_backward(
    grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, needs_parameters: bool
) -> tuple[Tensor, Tensor]:
    x = flat_pixels(x)
    return torch.empty_like(x), _parameters_like(x, needs_parameters)


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    check_differentiated_once()
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_x, parameters = channel_layer_norm_backward(
        grad, *ctx.saved_tensors, needs_weight or needs_bias, forward=ctx
    )
    return (
        grad_x if needs_x else None,
        parameters[0].to(grad.dtype) if needs_weight else None,
        parameters[1].to(grad.dtype) if needs_bias else None,
        None,
    )


channel_layer_norm_backward = Operator("fastconv::channel_norm_backward", Backward, _fake_backward)
channel_layer_norm = DifferentiableOperator("fastconv::channel_norm", Forward, _fake, _save, _gradients)
