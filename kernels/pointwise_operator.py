"""The pointwise convolution with GELU as one registered operator for each direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convolution import MAX_PARTIALS
from .launch import (
    accumulator,
    block_size,
    ceil_div,
    check_differentiated_once,
    flat_pixels,
    launch,
    new_maps,
    precision,
    strides,
)
from .pointwise import pointwise_gelu, pointwise_gelu_backward_weight, pointwise_gelu_backward_x
from .reduction import sum_columns

BLOCK_ROWS = 64


class Pointwise:
    """The sizes of a pointwise convolution, and how its kernels divide the work: rows are pixels of images."""

    def __init__(self, x: Tensor, weight: Tensor, approximate: str) -> None:
        self.images = x.shape[0]
        self.outputs, self.inputs = weight.shape
        self.pixels = x.shape[2] * x.shape[3]
        self.row_blocks = ceil_div(self.images * self.pixels, BLOCK_ROWS)
        self.block_inputs = block_size(self.inputs, 64)
        self.block_outputs = block_size(self.outputs, 64)
        self.input_blocks = ceil_div(self.inputs, self.block_inputs)
        self.output_blocks = ceil_div(self.outputs, self.block_outputs)
        self.options = {
            "PIXELS": self.pixels,
            "INPUTS": self.inputs,
            "OUTPUTS": self.outputs,
            "APPROXIMATE": approximate,
            "PRECISION": precision(weight),
            "BLOCK_ROWS": BLOCK_ROWS,
        }

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, y: Tensor) -> None:
        launch(
            pointwise_gelu,
            self.row_blocks * self.output_blocks,
            x,
            weight,
            bias,
            z,
            y,
            self.images,
            *strides(x),
            *strides(y),
            **self.options,
            HAS_BIAS=bias is not None,
            BLOCK_INPUTS=min(self.block_inputs, 32),
            BLOCK_OUTPUTS=self.block_outputs,
        )

    def backward_x(self, grad: Tensor, z: Tensor, weight: Tensor, grad_x: Tensor) -> None:
        launch(
            pointwise_gelu_backward_x,
            self.row_blocks * self.input_blocks,
            grad,
            z,
            weight,
            grad_x,
            self.images,
            *strides(grad),
            *strides(z),
            *strides(grad_x),
            **self.options,
            BLOCK_INPUTS=self.block_inputs,
            BLOCK_OUTPUTS=min(self.block_outputs, 32),
        )

    def backward_weight(self, grad: Tensor, z: Tensor, x: Tensor, result: Tensor) -> None:
        """Write the gradients of weight and bias, one after the other, to `result`."""
        tiles = self.input_blocks * self.output_blocks
        rounds = ceil_div(self.row_blocks, max(1, MAX_PARTIALS // tiles))
        partials = result.new_empty(ceil_div(self.row_blocks, rounds), len(result))
        launch(
            pointwise_gelu_backward_weight,
            len(partials) * tiles,
            grad,
            z,
            x,
            partials,
            self.images,
            rounds,
            *strides(grad),
            *strides(z),
            *strides(x),
            **self.options,
            BLOCK_INPUTS=self.block_inputs,
            BLOCK_OUTPUTS=self.block_outputs,
            num_warps=8,
        )
        launch(
            sum_columns,
            ceil_div(len(result), 128),
            partials,
            result,
            len(partials),
            LENGTH=len(result),
            BLOCK_ROWS=32,
            BLOCK_COLUMNS=128,
        )


@torch.library.custom_op("fastconv::pointwise_conv_gelu", mutates_args=())
def pointwise_conv_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """y (N, O, H, W) in the memory format of x, and for the backward z, like y: what goes into GELU."""
    x = flat_pixels(x)
    y, z = _results(x, weight)
    if x.numel() > 0:
        Pointwise(x, weight, approximate).forward(x, weight, bias, z, y)
    return y, z


def _results(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y = new_maps(x, weight.shape[0])
    return y, torch.empty_like(y)


@pointwise_conv_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return _results(flat_pixels(x), weight)


@torch.library.custom_op("fastconv::pointwise_conv_gelu_backward", mutates_args=())
def pointwise_conv_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, z: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    """The gradient of x, like x, and one vector of those of weight and bias."""
    x, grad = flat_pixels(x), flat_pixels(grad)
    grad_x = torch.empty_like(x)
    size = weight.numel() + weight.shape[0]
    if x.numel() == 0:
        return grad_x, x.new_zeros(size, dtype=accumulator(weight))
    parameters = x.new_empty(size, dtype=accumulator(weight))
    plan = Pointwise(x, weight, approximate)
    plan.backward_x(grad, z, weight, grad_x)
    plan.backward_weight(grad, z, x, parameters)
    return grad_x, parameters


@pointwise_conv_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, z: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    size = weight.numel() + weight.shape[0]
    return torch.empty_like(flat_pixels(x)), x.new_empty(size, dtype=accumulator(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.approximate = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    check_differentiated_once()
    weight = ctx.saved_tensors[1]
    grad_x, parameters = pointwise_conv_gelu_backward(grad, *ctx.saved_tensors, ctx.approximate)
    grad_weight, grad_bias = parameters.to(weight.dtype).split([weight.numel(), weight.shape[0]])
    needed = zip((grad_x, grad_weight.view(weight.shape), grad_bias), ctx.needs_input_grad, strict=False)
    return *(value if wanted else None for value, wanted in needed), None


pointwise_conv_gelu.register_autograd(_gradients, setup_context=_save)
