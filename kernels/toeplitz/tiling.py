"""How the depthwise convolution's kernels divide their work, and their launches; the block launches them too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.launch import Launch, block_size, ceil_div, is_before_ampere, precision
from ..common.layout import strides
from ..common.moments import NormGroups
from ..common.partials import MAX_PARTIALS, rounds_and_parts
from ..common.reduction import reduce_partials
from .kernels import depthwise_backward, depthwise_forward

# Rows of the products. For small batches too: sizes of results that followed the batch in steps would make
# torch.compile compile for each step.
BLOCK_IMAGES = 64


class ToeplitzTiling(NormGroups):
    """A program takes BLOCK_IMAGES images and a block of output pixels of one channel, and input pixels in steps.

    Args:
        x: (N, C, H, W)
        weight: (K, 1, kh, kw)
        norm, ranks_group: of the convolution's result, as `NormGroups`'s.
    """

    def __init__(self, x: Tensor, weight: Tensor, norm: str, ranks_group: str | None = None) -> None:
        super().__init__(norm, x.shape[0], ranks_group)
        self.channels, height, width = x.shape[1:]
        self.outputs, _, *kernel = weight.shape
        self.pixels = height * width
        self.block_pixels = block_size(self.pixels, 64)
        self.pixel_blocks = ceil_div(self.pixels, self.block_pixels)
        self.image_blocks = ceil_div(self.images, BLOCK_IMAGES)
        parts = self.outputs * self.pixel_blocks
        self.parts = self.parts_of_group(in_batch=parts * self.image_blocks, in_image=parts)
        # Where more is held at once. Registers hold each operand of float32 in two parts, and before Ampere halves
        # as float32: larger blocks spill.
        small = weight.dtype == torch.float32 or is_before_ampere()
        self.small_block = block_size(self.pixels, 32 if small else 64)
        self._taps = kernel[0] * kernel[1]
        self._map: dict[str, Any] = {
            "HEIGHT": height,
            "WIDTH": width,
            "KERNEL_HEIGHT": kernel[0],
            "KERNEL_WIDTH": kernel[1],
        }
        self._constants: dict[str, Any] = {
            **self._map,
            "MULTIPLIER": self.outputs // self.channels,
            "NORM": norm,
            "PRECISION": precision(weight),
            "BLOCK_IMAGES": BLOCK_IMAGES,
        }

    def new_h(self, weight: Tensor) -> Tensor:
        """Uninitialised h [N, K, P], the result of the convolution."""
        return weight.new_empty(self.images, self.outputs, self.pixels)

    def forward(self, x: Tensor, has_bias: bool) -> Launch:
        """A launch for x, weight, bias, h and its moments; writes the last two."""
        return Launch(
            depthwise_forward,
            self.outputs * self.pixel_blocks * self.image_blocks,
            self.images,
            self.parts,
            *strides(x),
            OUTPUTS=self.outputs,
            HAS_BIAS=has_bias,
            BLOCK_PIXELS=self.block_pixels,
            BLOCK_INPUTS=self.small_block,
            **self._constants,
        )

    def backward(
        self,
        g_strides: tuple[int, int, int],
        x: Tensor,
        residual: Tensor | None,
        grad_x: Tensor,
        moment_parts: int,
        sum_parts: int,
        eps: float,
    ) -> ToeplitzBackward:
        """
        Args:
            g_strides: the strides of image, channel and pixel of the gradient of the normalised tensor.
            residual: is added to grad_x.
            moment_parts, sum_parts: the parts of each group.
        """
        programs = self.channels * ceil_div(self.pixels, self.small_block)
        rounds, partials = rounds_and_parts(self.image_blocks, MAX_PARTIALS // programs)
        launch = Launch(
            depthwise_backward,
            programs * partials,
            self.images,
            rounds,
            moment_parts,
            sum_parts,
            eps,
            *g_strides,
            *strides(x),
            *strides(x if residual is None else residual),
            *strides(grad_x),
            CHANNELS=self.channels,
            HAS_RESIDUAL=residual is not None,
            BLOCK_PIXELS=self.small_block,
            BLOCK_PARTS=self.block_parts,
            num_warps=4 if self.small_block == 16 else 8,
            **self._constants,
        )
        return ToeplitzBackward(launch, partials, self.outputs, self.pixels)

    def reduce(self, rows: int, length: int, partials: int) -> Launch:
        """A launch that sums partial gradients: for columns [rows, length], matrices, biases and a result.

        The result is a vector of the sums of the columns, the taps' gradients, and the biases'.
        """
        return Launch(
            reduce_partials,
            ceil_div(length, 128) + self.outputs,
            rows,
            partials,
            self.outputs,
            LENGTH=length,
            BLOCK_ROWS=32,
            BLOCK_COLUMNS=128,
            BLOCK_TAPS=block_size(self._taps, 64),
            BLOCK_PIXELS=self.block_pixels,
            **self._map,
        )


class ToeplitzBackward:
    """Writes the gradient of x; returns partial gradients of the Toeplitz matrices and of the bias.

    Attributes:
        launch: for the arguments of a call, then what it returns. `grad_x` may be the residual itself: a program
            reads no element of it that another one writes.
        partials: how many partial gradients there are.
    """

    def __init__(self, launch: Launch, partials: int, outputs: int, pixels: int) -> None:
        self.launch = launch
        self.partials, self._outputs, self._pixels = partials, outputs, pixels

    def __call__(
        self,
        g: Tensor,
        h: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        moments: Tensor,
        sums: Tensor,
        grad_x: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            g: the gradient of the normalised tensor.
            sums: sums of g and of g * normalised, [groups, 2, parts].

        Returns:
            [partials, K, P, P] and [partials, K]
        """
        matrices = moments.new_empty(self.partials, self._outputs, self._pixels, self._pixels)
        biases = moments.new_empty(self.partials, self._outputs)
        residual = x if residual is None else residual
        self.launch(g, h, x, residual, weight, moments, sums, grad_x, matrices, biases)
        return matrices, biases
