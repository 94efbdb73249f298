"""How the kernels of the norm of each pixel divide their work, and their launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common.launch import Launch, ceil_div, next_power_of_2
from ..common.layout import stride_unit, strides
from ..common.partials import PartialSums, rounds_and_parts
from ..common.rules import accumulator
from .kernels import channel_norm, channel_norm_backward

# Programs of the backward: as many as a large GPU runs at once, because each keeps partial sums.
PROGRAMS = 512


class ChannelNormTiling:
    """A program takes all channels of `rows` pixels of maps x (N, C, H, W): about 2048 values, 16 to a thread."""

    def __init__(self, x: Tensor) -> None:
        self._images, self._channels = x.shape[:2]
        self._pixels = x.shape[2] * x.shape[3]
        self._accumulator = accumulator(x)
        block = next_power_of_2(self._channels)
        self.rows = max(1, 2048 // block)
        self._blocks = ceil_div(self._images * self._pixels, self.rows)
        self._constants: dict[str, Any] = {
            "CHANNELS": self._channels,
            "BLOCK_ROWS": self.rows,
            "BLOCK_CHANNELS": block,
        }

    def new_statistics(self, x: Tensor) -> Tensor:
        """Uninitialised means, and 1 / sqrt(variance + eps), of each pixel: [2, N * P]."""
        return x.new_empty(2, self._images * self._pixels, dtype=self._accumulator)

    def forward(self, x: Tensor, y: Tensor, has_weight: bool, has_bias: bool, eps: float) -> Launch:
        """A launch for x, weight, bias, y, and each pixel's mean and scale; writes the last three."""
        unit, in_units = _strides_in_units(x, y)
        return Launch(
            channel_norm,
            self._blocks,
            self._images,
            self._pixels,
            eps,
            *in_units,
            STRIDE_UNIT=unit,
            HAS_WEIGHT=has_weight,
            HAS_BIAS=has_bias,
            **self._constants,
        )

    def backward(
        self, grad: Tensor, x: Tensor, grad_x: Tensor, has_mean: bool, has_weight: bool, needs_parameters: bool
    ) -> PartialSums:
        """For grad, x, mean, scale, weight and grad_x, which it writes: the gradients of weight and bias, [2, C].

        Args:
            x: what was normalised or, without a mean, the normalised tensor.
            needs_parameters: if not, those gradients are empty, [0, C].
        """
        rounds, parts = rounds_and_parts(self._blocks, PROGRAMS)
        unit, in_units = _strides_in_units(grad, x, grad_x)
        launch = Launch(
            channel_norm_backward,
            parts,
            self._images,
            self._pixels,
            rounds,
            *in_units,
            STRIDE_UNIT=unit,
            HAS_MEAN=has_mean,
            HAS_WEIGHT=has_weight,
            NEEDS_PARAMETERS=needs_parameters,
            **self._constants,
        )
        return PartialSums(launch, parts, (2, self._channels), self._accumulator, needs_parameters)


def _strides_in_units(*maps: Tensor) -> tuple[int, list[int]]:
    """A unit that divides the strides of image and pixel; for each map the strides (image, channel, pixel) in it.

    Strides of channels are as they are.
    """
    found = [strides(x) for x in maps]
    unit = stride_unit(*(stride for image, _, pixel in found for stride in (image, pixel)))
    return unit, [stride for image, channel, pixel in found for stride in (image // unit, channel, pixel // unit)]
