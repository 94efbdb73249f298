"""Launches of the depthwise convolution, which the block and the operation of its own share."""

from __future__ import annotations

import torch
from torch import Tensor

from .depthwise import depthwise_backward, depthwise_forward
from .launch import block_size, ceil_div, is_before_ampere, launch, precision, strides
from .moments import Normed
from .reduction import reduce_partials

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
        self.weight = weight
        self.image_blocks = ceil_div(self.images, BLOCK_IMAGES)

    @property
    def small_block(self) -> int:
        """Of pixels, where more is held at once: larger blocks spill."""
        # Registers hold each operand of float32 in two parts, and before Ampere halves as float32.
        small = self.weight.dtype == torch.float32 or is_before_ampere(self.weight)
        return block_size(self.pixels, 32 if small else 64)

    @property
    def parts(self) -> int:
        parts = self.outputs * self.pixel_blocks
        return parts * self.image_blocks if self.norm == "tensor" else parts

    def new_h(self, weight: Tensor) -> Tensor:
        return weight.new_empty(self.images, self.outputs, self.pixels)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, moments: Tensor) -> None:
        """Write the convolution, [N, K, P], and its moments."""
        launch(
            depthwise_forward,
            self.outputs * self.pixel_blocks * self.image_blocks,
            x,
            weight,
            bias,
            h,
            moments,
            self.images,
            self.parts,
            *strides(x),
            OUTPUTS=self.outputs,
            MULTIPLIER=self.outputs // self.channels,
            HEIGHT=self.height,
            WIDTH=self.width,
            KERNEL_HEIGHT=self.kernel[0],
            KERNEL_WIDTH=self.kernel[1],
            HAS_BIAS=bias is not None,
            NORM=self.norm,
            PRECISION=precision(weight),
            BLOCK_IMAGES=BLOCK_IMAGES,
            BLOCK_PIXELS=self.block_pixels,
            BLOCK_INPUTS=self.small_block,
        )

    def backward(
        self,
        g: Tensor,
        g_strides: tuple[int, int, int],
        h: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        moments: Tensor,
        sums: Tensor,
        eps: float,
        grad_x: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write grad_x; return partial gradients of the Toeplitz matrices [partials, K, P, P], and of the bias.

        Args:
            g: the gradient of the normalised tensor, and `g_strides` those of its images, channels and pixels.
            residual: is added to grad_x.
            sums: of g and of g * normalised, [groups, 2, parts].
        """
        programs = self.channels * ceil_div(self.pixels, self.small_block)
        rounds = ceil_div(self.image_blocks, max(1, MAX_PARTIALS // programs))
        partials = ceil_div(self.image_blocks, rounds)
        matrices = moments.new_empty(partials, self.outputs, self.pixels, self.pixels)
        biases = moments.new_empty(partials, self.outputs)
        launch(
            depthwise_backward,
            programs * partials,
            g,
            h,
            x,
            x if residual is None else residual,
            weight,
            moments,
            sums,
            grad_x,
            matrices,
            biases,
            self.images,
            rounds,
            moments.shape[2],
            sums.shape[2],
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
        return matrices, biases

    def reduce(self, columns: Tensor, matrices: Tensor, biases: Tensor, result: Tensor) -> None:
        """Sum partials into `result`: the columns, [rows, columns]; the taps' gradients; the biases'."""
        rows, length = columns.shape
        launch(
            reduce_partials,
            ceil_div(length, 128) + self.outputs,
            columns,
            matrices,
            biases,
            result,
            rows,
            len(matrices),
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
