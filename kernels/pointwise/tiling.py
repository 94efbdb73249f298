"""How the pointwise convolution's kernels divide their work, and their launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common.launch import Launch, block_size, ceil_div, precision
from ..common.layout import strides
from ..common.partials import MAX_PARTIALS, PartialSums, rounds_and_parts
from ..common.rules import accumulator
from .kernels import pointwise_gelu, pointwise_gelu_backward_weight, pointwise_gelu_backward_x

# From here on, 128 rows to a program leave enough programs for a large GPU.
MANY_ROWS = 128 * 128


class PointwiseTiling:
    """A program makes a tile of at most 64 x 128 results, or 128 x 64, which four warps hold in registers.

    What is summed it reads in steps of 64 or 128 bytes: more would spill.

    Args:
        x: (N, I, H, W)
        weight: (O, I, 1, 1)
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self._outputs, self._inputs = weight.shape[:2]
        pixels = x.shape[2] * x.shape[3]
        self._images, self._rows = x.shape[0], x.shape[0] * pixels
        self._step = max(16, 64 // weight.element_size())
        self._accumulator = accumulator(weight)
        self._constants: dict[str, Any] = {
            "PIXELS": pixels,
            "INPUTS": self._inputs,
            "OUTPUTS": self._outputs,
            "PRECISION": precision(weight),
        }

    def forward(self, x: Tensor, y: Tensor, has_bias: bool, keep_slope: bool, approximate: str) -> Launch:
        """A launch for x, weight, bias, GELU's slope and y; writes the last two."""
        block_rows = 128 if self._rows >= MANY_ROWS else 64
        block_outputs = block_size(self._outputs, 64)
        return Launch(
            pointwise_gelu,
            ceil_div(self._rows, block_rows) * ceil_div(self._outputs, block_outputs),
            self._images,
            *strides(x),
            *strides(y),
            HAS_BIAS=has_bias,
            KEEP_SLOPE=keep_slope,
            APPROXIMATE=approximate,
            BLOCK_ROWS=block_rows,
            BLOCK_INPUTS=block_size(self._inputs, self._step),
            BLOCK_OUTPUTS=block_outputs,
            **self._constants,
        )

    def backward_x(self, grad: Tensor, slope: Tensor, grad_x: Tensor) -> Launch:
        """A launch for the gradient of y, the slope, weight and the gradient of x, which it writes."""
        block_inputs = block_size(self._inputs, 128)
        return Launch(
            pointwise_gelu_backward_x,
            ceil_div(self._rows, 64) * ceil_div(self._inputs, block_inputs),
            self._images,
            *strides(grad),
            *strides(slope),
            *strides(grad_x),
            BLOCK_ROWS=64,
            BLOCK_INPUTS=block_inputs,
            BLOCK_OUTPUTS=block_size(self._outputs, self._step),
            **self._constants,
        )

    def backward_parameters(self, grad: Tensor, slope: Tensor, x: Tensor) -> PartialSums:
        """For the gradient of y, the slope and x: the gradients of weight and bias, in one vector."""
        block_inputs, block_outputs = block_size(self._inputs, 128), block_size(self._outputs, 64)
        tiles = ceil_div(self._inputs, block_inputs) * ceil_div(self._outputs, block_outputs)
        block_rows = max(16, 128 // x.element_size())
        rounds, parts = rounds_and_parts(ceil_div(self._rows, block_rows), MAX_PARTIALS // tiles)
        launch = Launch(
            pointwise_gelu_backward_weight,
            parts * tiles,
            self._images,
            rounds,
            *strides(grad),
            *strides(slope),
            *strides(x),
            BLOCK_ROWS=block_rows,
            BLOCK_INPUTS=block_inputs,
            BLOCK_OUTPUTS=block_outputs,
            num_warps=8,
            **self._constants,
        )
        return PartialSums(launch, parts, (self._outputs * self._inputs + self._outputs,), self._accumulator)
