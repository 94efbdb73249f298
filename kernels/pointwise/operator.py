"""The pointwise convolution with GELU as one operator for each direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.launch import (
    Launch,
    block_size,
    ceil_div,
    flat_pixels,
    in_dtype,
    new_maps,
    precision,
    strides,
)
from ..common.partials import SumPartials
from ..common.registration import DifferentiableOperator, Operator
from ..common.rules import accumulator, check_differentiated_once
from ..toeplitz.plan import MAX_PARTIALS
from .kernels import pointwise_gelu, pointwise_gelu_backward_weight, pointwise_gelu_backward_x

# From here on, 128 rows to a program leave enough programs for a large GPU.
MANY_ROWS = 128 * 128


class Pointwise:
    """The sizes of a pointwise convolution, and how its kernels divide the work.

    Tiles of at most 64 x 128 results, or 128 x 64, and steps of 64 or 128 bytes along what is summed, which four
    warps hold in registers without spilling.
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.outputs, self.inputs = weight.shape[:2]
        self.images, self.pixels = x.shape[0], x.shape[2] * x.shape[3]
        self.rows = self.images * self.pixels
        self.step = max(16, 64 // weight.element_size())
        self.accumulator = accumulator(weight)
        self.options: dict[str, Any] = {
            "PIXELS": self.pixels,
            "INPUTS": self.inputs,
            "OUTPUTS": self.outputs,
            "PRECISION": precision(weight),
        }

    def forward(self, x: Tensor, y: Tensor, has_bias: bool, keep_slope: bool, approximate: str) -> Launch:
        """Of x, weight, bias, GELU's slope and y; writes the last two."""
        block_rows = 128 if self.rows >= MANY_ROWS else 64
        block_outputs = block_size(self.outputs, 64)
        return Launch(
            pointwise_gelu,
            ceil_div(self.rows, block_rows) * ceil_div(self.outputs, block_outputs),
            self.images,
            *strides(x),
            *strides(y),
            HAS_BIAS=has_bias,
            KEEP_SLOPE=keep_slope,
            APPROXIMATE=approximate,
            BLOCK_ROWS=block_rows,
            BLOCK_INPUTS=block_size(self.inputs, self.step),
            BLOCK_OUTPUTS=block_outputs,
            **self.options,
        )

    def backward_x(self, grad: Tensor, slope: Tensor, grad_x: Tensor) -> Launch:
        """Of the gradient of y, the slope, weight and the gradient of x, which it writes."""
        block_inputs = block_size(self.inputs, 128)
        return Launch(
            pointwise_gelu_backward_x,
            ceil_div(self.rows, 64) * ceil_div(self.inputs, block_inputs),
            self.images,
            *strides(grad),
            *strides(slope),
            *strides(grad_x),
            BLOCK_ROWS=64,
            BLOCK_INPUTS=block_inputs,
            BLOCK_OUTPUTS=block_size(self.outputs, self.step),
            **self.options,
        )

    def backward_parameters(self, grad: Tensor, slope: Tensor, x: Tensor) -> ParametersBackward:
        block_inputs, block_outputs = block_size(self.inputs, 128), block_size(self.outputs, 64)
        tiles = ceil_div(self.inputs, block_inputs) * ceil_div(self.outputs, block_outputs)
        block_rows = max(16, 128 // x.element_size())
        blocks = ceil_div(self.rows, block_rows)
        rounds = max(1, ceil_div(blocks, max(1, MAX_PARTIALS // tiles)))
        parts = ceil_div(blocks, rounds)
        launch = Launch(
            pointwise_gelu_backward_weight,
            parts * tiles,
            self.images,
            rounds,
            *strides(grad),
            *strides(slope),
            *strides(x),
            BLOCK_ROWS=block_rows,
            BLOCK_INPUTS=block_inputs,
            BLOCK_OUTPUTS=block_outputs,
            num_warps=8,
            **self.options,
        )
        return ParametersBackward(launch, parts, self.outputs * self.inputs + self.outputs, self.accumulator)


class ParametersBackward:
    """Of the gradient of y, the slope and x: the gradients of weight and bias, in one vector."""

    def __init__(self, launch: Launch, parts: int, length: int, dtype: torch.dtype) -> None:
        self._launch, self._size, self._dtype = launch, (parts, length), dtype
        self._sum = SumPartials(parts, length)

    def __call__(self, grad: Tensor, slope: Tensor, x: Tensor) -> Tensor:
        partials = x.new_empty(*self._size, dtype=self._dtype)
        self._launch(grad, slope, x, partials)
        return self._sum(partials)


class Forward:
    """y (N, O, H, W) in the memory format of x; for the backward GELU's slope, like y, or empty without one."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_slope: bool) -> None:
        x = flat_pixels(x)
        y = new_maps(x, weight.shape[0])
        self.launch = Pointwise(x, weight).forward(x, y, bias is not None, keep_slope, approximate)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_slope: bool
    ) -> tuple[Tensor, Tensor]:
        x = flat_pixels(x)
        y, slope = _results(x, weight, keep_slope)
        if y.numel() > 0:
            self.launch(x, weight, bias, slope if keep_slope else None, y)
        return y, slope


def _results(x: Tensor, weight: Tensor, keep_slope: bool) -> tuple[Tensor, Tensor]:
    y = new_maps(x, weight.shape[0])
    return y, torch.empty_like(y) if keep_slope else y.new_empty(0)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_slope: bool
) -> tuple[Tensor, Tensor]:
    return _results(flat_pixels(x), weight, keep_slope)


class Backward:
    """The gradient of x, like x, and one vector of those of weight and bias; empty where not needed."""

    def __init__(
        self, grad: Tensor, slope: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_parameters: bool
    ) -> None:
        x, grad = flat_pixels(x), flat_pixels(grad)
        sizes = Pointwise(x, weight)
        self.backward_x = sizes.backward_x(grad, slope, torch.empty_like(x))
        self.backward_parameters = sizes.backward_parameters(grad, slope, x)

    def __call__(
        self, grad: Tensor, slope: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_parameters: bool
    ) -> tuple[Tensor, Tensor]:
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
    return torch.empty_like(x) if needs_x else x.new_empty(0), x.new_empty(size, dtype=accumulator(weight))


def _fake_backward(
    grad: Tensor, slope: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor]:
    return _gradients_like(flat_pixels(x), weight, needs_x, needs_parameters)


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(output[1], x, weight)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    check_differentiated_once()
    weight = ctx.saved_tensors[2]
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_x, parameters = pointwise_conv_gelu_backward(
        grad, *ctx.saved_tensors, needs_x, needs_weight or needs_bias, forward=ctx
    )
    matrix, bias = in_dtype(parameters, weight.dtype).tensor_split([weight.numel()])
    return (
        grad_x if needs_x else None,
        matrix.view_as(weight) if needs_weight else None,
        bias if needs_bias else None,
        None,
        None,
    )


pointwise_conv_gelu_backward = Operator("fastconv::pointwise_conv_gelu_backward", Backward, _fake_backward)
pointwise_conv_gelu = DifferentiableOperator("fastconv::pointwise_conv_gelu", Forward, _fake, _save, _gradients)
