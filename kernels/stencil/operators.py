"""The depthwise convolution on maps of any size, alone and with the norm of each pixel, as operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..channel_norm.operators import ChannelNorm
from ..common.launch import (
    Launch,
    ceil_div,
    flat_pixels,
    memory_format,
    new_maps,
    next_power_of_2,
    stride_unit,
)
from ..common.partials import SumPartials
from ..common.registration import DifferentiableOperator, Operator
from ..common.rules import accumulator, check_differentiated_once
from .kernels import stencil, stencil_backward_taps, stencil_channel_norm

# Pixels of a program in a row, and channels of a thread, which keeps a sum for each pixel of each of its channels.
# With three times as many channels the strip is half as wide.
WIDEST_STRIP = 14
WIDEST_STRIP_OF_CHUNKS = 7
CHANNELS_OF_THREAD = 4
LARGEST_CHUNK = 1024
# The same where it keeps a sum for each tap.
MOST_TAPS = 49
WIDEST_STRIP_OF_TAPS = 7
CHANNELS_OF_THREAD_OF_TAPS = 2
# Rows below each other share inputs; but first each multiprocessor of a large GPU should have a few programs. For
# two at least, strips are made narrower.
MOST_LINES = 8
MOST_WARPS = 4
FEWEST_PROGRAMS = 512
LEAST_PROGRAMS = 256
# Pixels that a program takes of each channel: of fewer in plain (NCHW) maps it would load more than it needs.
LEAST_ROWS_OF_PLAIN_MAPS = 8
# Of the taps' gradient: as many as a large GPU runs at once with their registers, because each keeps partial sums.
PROGRAMS = 1024


def block_of(channels: int) -> int:
    """The power of two, of 16 to 128, that divides channels into blocks with the fewest left over."""
    return min((128, 64, 32, 16), key=lambda block: ceil_div(channels, block) * block)


def chunks_of(channels: int) -> tuple[int, int]:
    """How many blocks of a power of two hold `channels`: three where that is less, as of most ConvNeXts'."""
    third = next_power_of_2(ceil_div(channels, 3))
    whole = next_power_of_2(channels)
    if 3 * third < whole and 16 <= third <= LARGEST_CHUNK:
        return 3, third
    return max(1, whole // LARGEST_CHUNK), min(whole, LARGEST_CHUNK)


def _strides_in_units(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The strides of image and row in a unit, and as constants that unit and the stride of a pixel."""
    unit = stride_unit(x.stride(0), x.stride(2))
    # Of one pixel that of dense maps, lest any number compiles another kernel.
    column = x.stride(3) if x.shape[3] > 1 else x.shape[1]
    return (x.stride(0) // unit, x.stride(2) // unit), {"STRIDE_UNIT": unit, "X_COLUMN_STRIDE": column}


class Stencil:
    """The sizes of a depthwise convolution of `x`, channels side by side, and how its kernels divide the work."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.images, self.channels, self.height, self.width = x.shape
        self.outputs, _, self.kernel_height, self.kernel_width = weight.shape
        self.multiplier = self.outputs // self.channels
        self.lines = self.images * self.height
        self.options: dict[str, Any] = {
            "MULTIPLIER": self.multiplier,
            "KERNEL_HEIGHT": self.kernel_height,
            "KERNEL_WIDTH": self.kernel_width,
        }

    def forward(self, x: Tensor, channels: int, has_bias: bool) -> Launch:
        """Of x, the taps, bias and y, which it writes."""
        return self._convolution(x, channels, has_bias, transposed=False)

    def backward_x(self, grad: Tensor, channels: int) -> Launch:
        """Of the gradient of y, the taps, None and the gradient of x, which it writes."""
        return self._convolution(grad, channels, has_bias=False, transposed=True)

    def _convolution(self, x: Tensor, channels: int, has_bias: bool, transposed: bool) -> Launch:
        """To maps of so many channels."""
        block = block_of(channels)
        blocks = ceil_div(channels, block)
        strips, width = self._strips(WIDEST_STRIP, blocks)
        lines, warps = self._lines_and_warps(block, strips * blocks)
        image_and_row, units = _strides_in_units(x)
        return Launch(
            stencil,
            ceil_div(self.lines, lines) * strips * blocks,
            self.lines,
            self.height,
            self.width,
            *image_and_row,
            **units,
            CHANNELS=channels,
            OUTPUTS=self.outputs,
            TRANSPOSED=transposed,
            HAS_BIAS=has_bias,
            BLOCK_LINES=lines,
            BLOCK_WIDTH=width,
            BLOCK_CHANNELS=block,
            num_warps=warps,
            **self.options,
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
        """Of x, the taps, bias, the norm's weight and bias, y, normalised and scale; writes the last three."""
        chunks, block = chunks_of(self.outputs)
        strips, width = self._strips(WIDEST_STRIP if chunks == 1 else WIDEST_STRIP_OF_CHUNKS, 1)
        lines, warps = self._lines_and_warps(block, strips)
        image_and_row, units = _strides_in_units(x)
        return Launch(
            stencil_channel_norm,
            ceil_div(self.lines, lines) * strips,
            self.lines,
            self.height,
            self.width,
            eps,
            *image_and_row,
            **units,
            CHANNELS=self.outputs,
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
            **self.options,
        )

    def _strips(self, widest: int, programs_of_strip: int) -> tuple[int, int]:
        """Into how many strips of how many pixels a row is divided."""
        # Narrower where a few images would leave multiprocessors without programs.
        while widest > 2 and self.lines * ceil_div(self.width, widest) * programs_of_strip < LEAST_PROGRAMS:
            widest = ceil_div(widest, 2)
        strips = ceil_div(self.width, widest)
        return strips, ceil_div(self.width, strips)

    def _lines_and_warps(self, block: int, programs_of_line: int) -> tuple[int, int]:
        """Rows and warps of a program that has `block` channels of each row."""
        of_warp = 32 * CHANNELS_OF_THREAD
        lines = max(1, of_warp // block)
        while (
            2 * lines <= MOST_LINES
            and 2 * lines * block <= MOST_WARPS * of_warp
            and self.lines * programs_of_line >= 2 * lines * FEWEST_PROGRAMS
        ):
            lines *= 2
        return lines, max(1, lines * block // of_warp)

    def backward_parameters(self, x: Tensor, dtype: torch.dtype) -> ParametersBackward:
        """
        Args:
            dtype: of sums.
        """
        of_warp = 32 * CHANNELS_OF_THREAD_OF_TAPS
        block = min(block_of(self.outputs), of_warp)
        lines = of_warp // block
        tap_rows = max(1, min(self.kernel_height, MOST_TAPS // self.kernel_width))
        tiles = ceil_div(self.outputs, block) * ceil_div(self.kernel_height, tap_rows)
        strips, width = self._strips(WIDEST_STRIP_OF_TAPS, tiles)
        blocks = ceil_div(self.lines * strips, lines)
        rounds = max(1, ceil_div(blocks, max(1, PROGRAMS // tiles)))
        parts = ceil_div(blocks, rounds)
        image_and_row, units = _strides_in_units(x)
        launch = Launch(
            stencil_backward_taps,
            parts * tiles,
            self.lines,
            rounds,
            self.height,
            self.width,
            *image_and_row,
            **units,
            CHANNELS=self.outputs,
            BLOCK_TAP_ROWS=tap_rows,
            BLOCK_LINES=lines,
            BLOCK_WIDTH=width,
            BLOCK_CHANNELS=block,
            num_warps=1,
            **self.options,
        )
        return ParametersBackward(launch, (parts, self.kernel_height * self.kernel_width + 1, self.outputs), dtype)


class ParametersBackward:
    """Of the gradient of y and x: the gradients of the taps, then of the bias, [kh * kw + 1, K]."""

    def __init__(self, launch: Launch, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._launch, self._size, self._dtype = launch, size, dtype
        self._sum = SumPartials(size[0], size[1] * size[2])

    def __call__(self, grad: Tensor, x: Tensor) -> Tensor:
        partials = grad.new_empty(*self._size, dtype=self._dtype)
        self._launch(grad, x, partials)
        return self._sum(partials)


def channels_side_by_side(x: Tensor) -> Tensor:
    """`x`, or a copy of it, with its channels side by side, and each image within the reach of 32 bits."""
    reach = (x.shape[2] - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3) + x.shape[1]
    if (x.stride(1) == 1 or x.shape[1] == 1) and reach < 2**31:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def taps_first(weight: Tensor) -> Tensor:
    """[K, 1, kh, kw] as [kh * kw, K], in the dtype of sums, so that no program has to convert them."""
    taps = weight.flatten(1).t()
    return torch.empty_like(taps, dtype=accumulator(weight), memory_format=torch.contiguous_format).copy_(taps)


def new_channels_last(x: Tensor, channels: int) -> Tensor:
    """Uninitialised maps like `x` but for their channels, which lie side by side."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], channels).permute(0, 3, 1, 2)


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """`y`, whose channels lie side by side, or a copy of it, in the memory format of `x`."""
    return y if memory_format(x) == torch.channels_last else new_maps(x, y.shape[1]).copy_(y)


class Forward:
    """(N, K, H, W) in the memory format of x, by a sum over the taps."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        source = channels_side_by_side(x)
        self.launch = Stencil(source, weight).forward(source, weight.shape[0], bias is not None)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = new_channels_last(x, weight.shape[0])
        if x.numel() > 0:
            self.launch(channels_side_by_side(x), taps_first(weight), bias, y)
        return in_format_of(x, y)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return new_maps(x, weight.shape[0])


class Backward:
    """The gradient of x, in its format, and of the taps and the bias, [kh * kw + 1, K]; empty where not needed."""

    def __init__(self, grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_parameters: bool) -> None:
        source = channels_side_by_side(x)
        sizes = Stencil(source, weight)
        self.backward_x = sizes.backward_x(new_channels_last(x, weight.shape[0]), x.shape[1])
        self.backward_parameters = sizes.backward_parameters(source, accumulator(x))

    def __call__(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_parameters: bool
    ) -> tuple[Tensor, Tensor]:
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


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor]:
    return _gradients_like(x, weight, needs_x, needs_parameters)


def _save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    check_differentiated_once()
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad_x, parameters = depthwise_conv_backward(grad, x, weight, needs_x, needs_weight or needs_bias, forward=ctx)
    taps, shift = _taps_and_bias(parameters, weight, needs_weight, needs_bias)
    return grad_x if needs_x else None, taps, shift


def _taps_and_bias(
    parameters: Tensor, weight: Tensor, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a weight, (K, 1, kh, kw), and a bias from [kh * kw + 1, K]."""
    taps = parameters[:-1].t().to(weight.dtype).reshape(weight.shape) if needs_weight else None
    return taps, parameters[-1].to(weight.dtype) if needs_bias else None


depthwise_conv_backward = Operator("fastconv::depthwise_conv_backward", Backward, _fake_backward)
depthwise_conv = DifferentiableOperator("fastconv::depthwise_conv", Forward, _fake, _save, _gradients)


class NormedForward:
    """y (N, K, H, W) in the memory format of x and, to `keep` for the backward, or else empty:

    the normalised tensor, channels_last, empty too if y is that; and 1 / sqrt(variance + eps), [N * H * W].
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        keep: bool,
    ) -> None:
        source = channels_side_by_side(x)
        normalised, _ = _kept_like(x, weight, norm_weight, norm_bias, keep)
        self.launch = Stencil(source, weight).forward_norm(
            source,
            bias is not None,
            norm_weight is not None,
            norm_bias is not None,
            eps,
            normalised.numel() > 0,
            keep,
        )

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = new_channels_last(x, weight.shape[0])
        normalised, scale = _kept_like(x, weight, norm_weight, norm_bias, keep)
        if x.numel() > 0:
            kept = normalised if normalised.numel() > 0 else None
            self.launch(
                channels_side_by_side(x),
                taps_first(weight),
                bias,
                norm_weight,
                norm_bias,
                y,
                kept,
                scale if keep else None,
            )
        return in_format_of(x, y), normalised, scale


def _kept_like(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    affine = norm_weight is not None or norm_bias is not None
    normalised = new_channels_last(x, weight.shape[0]) if keep and affine else x.new_empty(0)
    rows = x.shape[0] * x.shape[2] * x.shape[3] if keep else 0
    return normalised, x.new_empty(rows, dtype=accumulator(x))


def _fake_normed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return new_maps(x, weight.shape[0]), *_kept_like(x, weight, norm_weight, norm_bias, keep)


class NormedBackward:
    """As `Backward`, and the gradients of the norm's weight and bias, [2, K], or empty."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor | None,
        normalised: Tensor,
        scale: Tensor,
        needs_x: bool,
        needs_parameters: bool,
        needs_norm: bool,
    ) -> None:
        norm = ChannelNorm(grad)
        # A program would load more of plain maps than it needs.
        self.permutes = norm.rows < LEAST_ROWS_OF_PLAIN_MAPS
        grad_h = new_channels_last(x, weight.shape[0])
        self.norm = norm.backward(
            self._source(grad), flat_pixels(normalised), grad_h, False, norm_weight is not None, needs_norm
        )
        self.convolution = Backward(grad_h, x, weight, needs_x, needs_parameters)

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor | None,
        normalised: Tensor,
        scale: Tensor,
        needs_x: bool,
        needs_parameters: bool,
        needs_norm: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if x.numel() == 0:
            grad_x, parameters = _gradients_like(x, weight, needs_x, needs_parameters)
            return grad_x, parameters.zero_(), _norm_gradients_like(x, weight, needs_norm).zero_()
        grad_h = new_channels_last(x, weight.shape[0])
        norm = self.norm(self._source(grad), flat_pixels(normalised), None, scale, norm_weight, grad_h)
        return *self.convolution(grad_h, x, weight, needs_x, needs_parameters), norm

    def _source(self, grad: Tensor) -> Tensor:
        return flat_pixels(grad.contiguous(memory_format=torch.channels_last) if self.permutes else grad)


def _norm_gradients_like(x: Tensor, weight: Tensor, needs_norm: bool) -> Tensor:
    return x.new_empty(2 if needs_norm else 0, weight.shape[0], dtype=accumulator(x))


def _fake_normed_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    normalised: Tensor,
    scale: Tensor,
    needs_x: bool,
    needs_parameters: bool,
    needs_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _gradients_like(x, weight, needs_x, needs_parameters)
    return *gradients, _norm_gradients_like(x, weight, needs_norm)


def _save_normed(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, weight, _, norm_weight, norm_bias, _, _ = inputs
    y, normalised, scale = output
    affine = norm_weight is not None or norm_bias is not None
    ctx.save_for_backward(x, weight, norm_weight, normalised if affine else y, scale)
    ctx.set_materialize_grads(False)


def _normed_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    check_differentiated_once()
    x, weight, norm_weight, normalised, scale = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_norm_weight, needs_norm_bias, *_ = ctx.needs_input_grad
    grad_x, parameters, norm = depthwise_conv_channel_norm_backward(
        grad,
        x,
        weight,
        norm_weight,
        normalised,
        scale,
        needs_x,
        needs_weight or needs_bias,
        needs_norm_weight or needs_norm_bias,
        forward=ctx,
    )
    return (
        grad_x if needs_x else None,
        *_taps_and_bias(parameters, weight, needs_weight, needs_bias),
        norm[0].to(weight.dtype) if needs_norm_weight else None,
        norm[1].to(weight.dtype) if needs_norm_bias else None,
        None,
        None,
    )


depthwise_conv_channel_norm_backward = Operator(
    "fastconv::depthwise_conv_channel_norm_backward", NormedBackward, _fake_normed_backward
)
depthwise_conv_channel_norm = DifferentiableOperator(
    "fastconv::depthwise_conv_channel_norm", NormedForward, _fake_normed, _save_normed, _normed_gradients
)
