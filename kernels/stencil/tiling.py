"""How the stencils divide their work, and their launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.launch import Launch, ceil_div, next_power_of_2
from ..common.layout import stride_unit
from ..common.partials import PartialSums, rounds_and_parts
from .kernels import stencil, stencil_backward_taps, stencil_channel_norm

# The sums of a thread, beside one row of taps or of gradients, must fit its 255 registers:
#
#   stencil                 14 pixels x 4 channels             =  56 sums
#   stencil_channel_norm    as stencil if one chunk holds all channels, else
#                            7 pixels x 4 channels x 3 chunks  =  84
#   stencil_backward_taps   49 taps   x 2 channels             =  98
#
# Four channels of float32 are 16 bytes, the widest access. Maps of ConvNeXt are 56, 28, 14 and 7 pixels wide.
CHANNELS_OF_THREAD = 4
WIDEST_STRIP = 14
WIDEST_STRIP_OF_CHUNKS = 7
CHANNELS_OF_THREAD_OF_TAPS = 2
MOST_TAPS = 49
# The gradients of a strip's pixels are in registers while its inputs pass.
WIDEST_STRIP_OF_TAPS = 7
# Channels in a chunk: a program of more spills, and has more threads than AMD's GPUs launch.
LARGEST_CHUNK = 1024
# A program takes several rows, because rows below each other read the same inputs; at most so many, in so many
# warps.
MOST_LINES = 8
MOST_WARPS = 4
# It does so only while this many programs are left: four for each multiprocessor of a large GPU.
PROGRAMS_FOR_SEVERAL_LINES = 512
# With fewer programs than this, two for each multiprocessor, strips are made narrower.
PROGRAMS_FOR_WIDE_STRIPS = 256
# Programs for the taps' gradients, each of which keeps partial sums: as many as a large GPU runs at once.
PROGRAMS_OF_TAPS = 1024


def block_of(channels: int) -> int:
    """The power of two, of 16 to 128, that divides channels into blocks with the fewest left over."""
    return min((128, 64, 32, 16), key=lambda block: ceil_div(channels, block) * block)


def chunks_of(channels: int) -> tuple[int, int]:
    """How many chunks of which power of two hold `channels`: three if that is less, as for most ConvNeXts'."""
    third = next_power_of_2(ceil_div(channels, 3))
    whole = next_power_of_2(channels)
    if 3 * third < whole and 16 <= third <= LARGEST_CHUNK:
        return 3, third
    return max(1, whole // LARGEST_CHUNK), min(whole, LARGEST_CHUNK)


def _strides_in_units(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The strides of image and row in a unit, and as constants that unit and the stride of a pixel."""
    unit = stride_unit(x.stride(0), x.stride(2))
    # Maps one pixel wide have any number as that stride; that of dense maps compiles no kernel of its own.
    column = x.stride(3) if x.shape[3] > 1 else x.shape[1]
    return (x.stride(0) // unit, x.stride(2) // unit), {"STRIDE_UNIT": unit, "X_COLUMN_STRIDE": column}


class StencilTiling:
    """A program takes a strip of pixels of each of several lines, the rows of images, and a block of channels.

    Args:
        x: (N, C, H, W), channels side by side
        weight: (K, 1, kh, kw)
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        images, channels, self._height, self._width = x.shape
        self._outputs, _, self._kernel_height, self._kernel_width = weight.shape
        self._lines = images * self._height
        self._constants: dict[str, Any] = {
            "MULTIPLIER": self._outputs // channels,
            "KERNEL_HEIGHT": self._kernel_height,
            "KERNEL_WIDTH": self._kernel_width,
        }

    def forward(self, x: Tensor, has_bias: bool) -> Launch:
        """A launch for x, the taps, bias and y, which it writes."""
        return self._convolution(x, self._outputs, has_bias, transposed=False)

    def backward_x(self, grad: Tensor, channels: int) -> Launch:
        """A launch for the gradient of y, the taps, None and the gradient of x, which it writes."""
        return self._convolution(grad, channels, has_bias=False, transposed=True)

    def _convolution(self, x: Tensor, channels: int, has_bias: bool, transposed: bool) -> Launch:
        """
        Args:
            channels: channels of the result.
        """
        block = block_of(channels)
        blocks = ceil_div(channels, block)
        strips, width = self._strips(WIDEST_STRIP, blocks)
        lines, warps = self._lines_and_warps(block, strips * blocks)
        image_and_row, units = _strides_in_units(x)
        return Launch(
            stencil,
            ceil_div(self._lines, lines) * strips * blocks,
            self._lines,
            self._height,
            self._width,
            *image_and_row,
            **units,
            CHANNELS=channels,
            OUTPUTS=self._outputs,
            TRANSPOSED=transposed,
            HAS_BIAS=has_bias,
            BLOCK_LINES=lines,
            BLOCK_WIDTH=width,
            BLOCK_CHANNELS=block,
            num_warps=warps,
            **self._constants,
        )

    def forward_norm(
        self,
        x: Tensor,
        has_bias: bool,
        has_norm_weight: bool,
        has_norm_bias: bool,
        eps: float,
        keep_normalised: bool,
        keep_scale: bool,
    ) -> Launch:
        """A launch for x, the taps, bias, the norm's weight and bias, y, normalised and scale, of which it writes
        the last three."""
        chunks, block = chunks_of(self._outputs)
        strips, width = self._strips(WIDEST_STRIP if chunks == 1 else WIDEST_STRIP_OF_CHUNKS, 1)
        lines, warps = self._lines_and_warps(block, strips)
        image_and_row, units = _strides_in_units(x)
        return Launch(
            stencil_channel_norm,
            ceil_div(self._lines, lines) * strips,
            self._lines,
            self._height,
            self._width,
            eps,
            *image_and_row,
            **units,
            CHANNELS=self._outputs,
            HAS_BIAS=has_bias,
            HAS_NORM_WEIGHT=has_norm_weight,
            HAS_NORM_BIAS=has_norm_bias,
            KEEP_NORMALISED=keep_normalised,
            KEEP_SCALE=keep_scale,
            BLOCK_LINES=lines,
            BLOCK_WIDTH=width,
            CHUNKS=chunks,
            BLOCK_CHANNELS=block,
            num_warps=warps,
            **self._constants,
        )

    def backward_parameters(self, x: Tensor, dtype: torch.dtype) -> PartialSums:
        """For the gradient of y and x: the gradients of the taps, then of the bias, [kh * kw + 1, K].

        Args:
            dtype: the dtype in which sums are kept.
        """
        of_warp = 32 * CHANNELS_OF_THREAD_OF_TAPS
        block = min(block_of(self._outputs), of_warp)
        lines = of_warp // block
        tap_rows = max(1, min(self._kernel_height, MOST_TAPS // self._kernel_width))
        tiles = ceil_div(self._outputs, block) * ceil_div(self._kernel_height, tap_rows)
        strips, width = self._strips(WIDEST_STRIP_OF_TAPS, tiles)
        rounds, parts = rounds_and_parts(ceil_div(self._lines * strips, lines), PROGRAMS_OF_TAPS // tiles)
        image_and_row, units = _strides_in_units(x)
        launch = Launch(
            stencil_backward_taps,
            parts * tiles,
            self._lines,
            rounds,
            self._height,
            self._width,
            *image_and_row,
            **units,
            CHANNELS=self._outputs,
            BLOCK_TAP_ROWS=tap_rows,
            BLOCK_LINES=lines,
            BLOCK_WIDTH=width,
            BLOCK_CHANNELS=block,
            num_warps=1,
            **self._constants,
        )
        return PartialSums(launch, parts, (self._kernel_height * self._kernel_width + 1, self._outputs), dtype)

    def _strips(self, widest: int, programs_of_strip: int) -> tuple[int, int]:
        """Into how many strips of how many pixels a row is divided."""
        while (
            widest > 2
            and self._lines * ceil_div(self._width, widest) * programs_of_strip < PROGRAMS_FOR_WIDE_STRIPS
        ):
            widest = ceil_div(widest, 2)
        strips = ceil_div(self._width, widest)
        return strips, ceil_div(self._width, strips)

    def _lines_and_warps(self, block: int, programs_of_line: int) -> tuple[int, int]:
        """Rows and warps of a program that has `block` channels of each row."""
        of_warp = 32 * CHANNELS_OF_THREAD
        lines = max(1, of_warp // block)
        while (
            2 * lines <= MOST_LINES
            and 2 * lines * block <= MOST_WARPS * of_warp
            and self._lines * programs_of_line >= 2 * lines * PROGRAMS_FOR_SEVERAL_LINES
        ):
            lines *= 2
        return lines, max(1, lines * block // of_warp)
