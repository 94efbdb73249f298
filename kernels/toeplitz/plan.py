"""Launches of the depthwise convolution, which the block and the operation of its own share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.launch import Launch, block_size, ceil_div, is_before_ampere, precision, strides
from ..common.reduction import reduce_partials
from ..layer_norm.plan import Normed
from .kernels import depthwise_backward, depthwise_forward

# Rows of the products. For small batches too: sizes of results that followed the batch in steps would make
# torch.compile compile for each step.
BLOCK_IMAGES = 64
# Of programs that keep partial weight gradients: about two for each multiprocessor of a large GPU.
MAX_PARTIALS = 256


class Depthwise(Normed):
    """The sizes of a depthwise convolution, and how its kernels divide the work."""

    def __init__(self, x: Tensor, weight: Tensor, norm: str) -> None:
        super().__init__(norm, x.shape[0])
        self.channels, self.height, self.width = x.shape[1:]
        self.outputs = weight.shape[0]
        self.kernel = weight.shape[2], weight.shape[3]
        self.pixels = self.height * self.width
        self.block_pixels = block_size(self.pixels, 64)
        self.pixel_blocks = ceil_div(self.pixels, self.block_pixels)
        self.image_blocks = ceil_div(self.images, BLOCK_IMAGES)
        parts = self.outputs * self.pixel_blocks
        self.parts = parts * self.image_blocks if norm == "tensor" else parts
        # Where more is held at once. Registers hold each operand of float32 in two parts, and before Ampere halves
        # as float32: larger blocks spill.
        small = weight.dtype == torch.float32 or is_before_ampere()
        self.small_block = block_size(self.pixels, 32 if small else 64)

    def new_h(self, weight: Tensor) -> Tensor:
        return weight.new_empty(self.images, self.outputs, self.pixels)

    def forward(self, x: Tensor, weight: Tensor, has_bias: bool) -> Launch:
        """Of x, weight, bias, h and moments: writes h, the convolution, [N, K, P], and its moments."""
        return Launch(
            depthwise_forward,
            self.outputs * self.pixel_blocks * self.image_blocks,
            self.images,
            self.parts,
            *strides(x),
            OUTPUTS=self.outputs,
            MULTIPLIER=self.outputs // self.channels,
            HEIGHT=self.height,
            WIDTH=self.width,
            KERNEL_HEIGHT=self.kernel[0],
            KERNEL_WIDTH=self.kernel[1],
            HAS_BIAS=has_bias,
            NORM=self.norm,
            PRECISION=precision(weight),
            BLOCK_IMAGES=BLOCK_IMAGES,
            BLOCK_PIXELS=self.block_pixels,
            BLOCK_INPUTS=self.small_block,
        )

    def backward(
        self,
        g_strides: tuple[int, int, int],
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        grad_x: Tensor,
        moment_parts: int,
        sum_parts: int,
        eps: float,
    ) -> DepthwiseBackward:
        """
        Args:
            g_strides: of images, channels and pixels of the gradient of the normalised tensor.
            residual: is added to grad_x.
            moment_parts, sum_parts: of each group.
        """
        programs = self.channels * ceil_div(self.pixels, self.small_block)
        rounds = max(1, ceil_div(self.image_blocks, max(1, MAX_PARTIALS // programs)))
        partials = ceil_div(self.image_blocks, rounds)
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
            MULTIPLIER=self.outputs // self.channels,
            HEIGHT=self.height,
            WIDTH=self.width,
            KERNEL_HEIGHT=self.kernel[0],
            KERNEL_WIDTH=self.kernel[1],
            HAS_RESIDUAL=residual is not None,
            NORM=self.norm,
            PRECISION=precision(weight),
            BLOCK_IMAGES=BLOCK_IMAGES,
            BLOCK_PIXELS=self.small_block,
            BLOCK_PARTS=self.block_parts,
            num_warps=4 if self.small_block == 16 else 8,
        )
        return DepthwiseBackward(launch, partials, self.outputs, self.pixels)

    def reduce(self, rows: int, length: int, partials: int) -> Launch:
        """Of columns [rows, length], matrices, biases and a result: sums the partials of each.

        The result is a vector of the sums of the columns, the taps' gradients, and the biases'.
        """
        return Launch(
            reduce_partials,
            ceil_div(length, 128) + self.outputs,
            rows,
            partials,
            self.outputs,
            LENGTH=length,
            HEIGHT=self.height,
            WIDTH=self.width,
            KERNEL_HEIGHT=self.kernel[0],
            KERNEL_WIDTH=self.kernel[1],
            BLOCK_ROWS=32,
            BLOCK_COLUMNS=128,
            BLOCK_TAPS=block_size(self.kernel[0] * self.kernel[1], 64),
            BLOCK_PIXELS=self.block_pixels,
        )


class DepthwiseBackward:
    """Writes the gradient of x; returns partial gradients of the Toeplitz matrices and of the bias."""

    def __init__(self, launch: Launch, partials: int, outputs: int, pixels: int) -> None:
        self._launch = launch
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
            sums: of g and of g * normalised, [groups, 2, parts].

        Returns:
            [partials, K, P, P] and [partials, K]
        """
        matrices = moments.new_empty(self.partials, self._outputs, self._pixels, self._pixels)
        biases = moments.new_empty(self.partials, self._outputs)
        residual = x if residual is None else residual
        self._launch(g, h, x, residual, weight, moments, sums, grad_x, matrices, biases)
        return matrices, biases
