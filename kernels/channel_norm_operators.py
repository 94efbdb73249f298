"""Layer norm over the channels of each pixel as a registered operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .channel_norm import channel_norm, channel_norm_backward
from .launch import (
    accumulator,
    ceil_div,
    check_differentiated_once,
    flat_pixels,
    launch,
    next_power_of_2,
    stride_unit,
    strides,
)
from .partials import sum_partials

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

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor, statistics: Tensor
    ) -> None:
        unit, in_units = _strides_in_units(x, y)
        launch(
            channel_norm,
            self.blocks,
            x,
            weight,
            bias,
            y,
            statistics[0],
            statistics[1],
            self.images,
            self.pixels,
            eps,
            *in_units,
            STRIDE_UNIT=unit,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            **self.options,
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor | None,
        scale: Tensor,
        weight: Tensor | None,
        grad_x: Tensor,
        needs_parameters: bool,
    ) -> Tensor:
        """Write the gradient of what was normalised; return those of weight and bias, [2, C], or [0, C].

        Args:
            x: what was normalised or, without a mean, the normalised tensor.
        """
        rounds = ceil_div(self.blocks, PROGRAMS)
        programs = ceil_div(self.blocks, rounds)
        partials = scale.new_empty(programs, 2, self.channels) if needs_parameters else None
        unit, in_units = _strides_in_units(grad, x, grad_x)
        launch(
            channel_norm_backward,
            programs,
            grad,
            x,
            mean,
            scale,
            weight,
            grad_x,
            partials,
            self.images,
            self.pixels,
            rounds,
            *in_units,
            STRIDE_UNIT=unit,
            HAS_MEAN=mean is not None,
            HAS_WEIGHT=weight is not None,
            NEEDS_PARAMETERS=needs_parameters,
            **self.options,
        )
        return scale.new_empty(0, self.channels) if partials is None else sum_partials(partials)


def _strides_in_units(*maps: Tensor) -> tuple[int, list[int]]:
    """A unit, and of each of `maps` the strides of image and pixel in it, and between them that of channel."""
    found = [strides(x) for x in maps]
    unit = stride_unit(*(stride for image, _, pixel in found for stride in (image, pixel)))
    return unit, [stride for image, channel, pixel in found for stride in (image // unit, channel, pixel // unit)]


@torch.library.custom_op("fastconv::channel_norm", mutates_args=())
def channel_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y like x, and for the backward of each pixel the mean and 1 / sqrt(variance + eps), [2, N * P]."""
    x = flat_pixels(x)
    plan = ChannelNorm(x)
    y, statistics = torch.empty_like(x), plan.new_statistics(x)
    if x.numel() > 0:
        plan.forward(x, weight, bias, eps, y, statistics)
    return y, statistics


@channel_layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    x = flat_pixels(x)
    return torch.empty_like(x), ChannelNorm(x).new_statistics(x)


@torch.library.custom_op("fastconv::channel_norm_backward", mutates_args=())
def channel_layer_norm_backward(
    grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, needs_parameters: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, like x, and of weight and bias, [2, C], or empty."""
    x, grad = flat_pixels(x), flat_pixels(grad)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, _parameters_like(x, needs_parameters).zero_()
    mean, scale = statistics[0], statistics[1]
    parameters = ChannelNorm(x).backward(grad, x, mean, scale, weight, grad_x, needs_parameters)
    return grad_x, parameters


def _parameters_like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(2 if needed else 0, x.shape[1], dtype=accumulator(x))


@channel_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, needs_parameters: bool
) -> tuple[Tensor, Tensor]:
    x = flat_pixels(x)
    return torch.empty_like(x), _parameters_like(x, needs_parameters)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    check_differentiated_once()
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_x, parameters = channel_layer_norm_backward(grad, *ctx.saved_tensors, needs_weight or needs_bias)
    return (
        grad_x if needs_x else None,
        parameters[0].to(grad.dtype) if needs_weight else None,
        parameters[1].to(grad.dtype) if needs_bias else None,
        None,
    )


channel_layer_norm.register_autograd(_gradients, setup_context=_save)
