"""How the block's own kernels divide their work, and their launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common.launch import Launch, block_size, ceil_div, next_power_of_2, precision
from ..common.layout import strides
from ..common.partials import MAX_PARTIALS, rounds_and_parts
from ..toeplitz.tiling import ToeplitzTiling
from .kernels import norm_mlp_residual, norm_mlp_residual_backward

# Rows times hidden channels of a program, which holds them in registers, some times over.
LARGEST_TILE = 2048


class MlpTiling:
    """A program takes a block of some pixels of some images, and all channels of them.

    Args:
        toeplitz: the tiling of the convolution before.
        weight: (O, K, 1, 1)
        approximate: GELU's `approximate`.
    """

    def __init__(self, toeplitz: ToeplitzTiling, weight: Tensor, approximate: str) -> None:
        hidden = weight.shape[0]
        # All of them, and at least the 16 that tensor cores take.
        block_hidden = max(16, next_power_of_2(hidden))
        rows = block_size(LARGEST_TILE // block_hidden, 64)
        block_pixels = min(toeplitz.block_pixels, rows)
        block_images = rows // block_pixels
        pixel_blocks = ceil_div(toeplitz.pixels, block_pixels)
        self._images, self._inputs = toeplitz.images, toeplitz.outputs
        self._blocks = ceil_div(toeplitz.images, block_images) * pixel_blocks
        # Parts of the sums for the norm's backward; rows and columns of the parameters' partial gradients.
        self.sum_parts = toeplitz.parts_of_group(in_batch=self._blocks, in_image=pixel_blocks)
        self._rounds, self.partials = rounds_and_parts(self._blocks, MAX_PARTIALS)
        self.length = hidden * (toeplitz.outputs + 1) + toeplitz.channels * (hidden + 1)
        self._constants: dict[str, Any] = {
            "PIXELS": toeplitz.pixels,
            "INPUTS": toeplitz.outputs,
            "HIDDEN": hidden,
            "CHANNELS": toeplitz.channels,
            "NORM": toeplitz.norm,
            "APPROXIMATE": approximate,
            "PRECISION": precision(weight),
            "BLOCK_PARTS": toeplitz.block_parts,
            "BLOCK_IMAGES": block_images,
            "BLOCK_PIXELS": block_pixels,
            "BLOCK_HIDDEN": block_hidden,
            "BLOCK_CHANNELS": max(16, next_power_of_2(toeplitz.channels)),
            "num_warps": 4 if hidden <= 64 else 8,
        }

    def forward(
        self, x: Tensor, y: Tensor, moment_parts: int, eps: float, has_bias: bool, has_projection_bias: bool
    ) -> Launch:
        """A launch for h, its moments, x, weight, bias, projection, its bias, z and y; writes the last two."""
        return Launch(
            norm_mlp_residual,
            self._blocks,
            self._images,
            moment_parts,
            eps,
            *strides(x),
            *strides(y),
            HAS_BIAS=has_bias,
            HAS_PROJECTION_BIAS=has_projection_bias,
            BLOCK_INPUTS=block_size(self._inputs, 64),
            **self._constants,
        )

    def backward(self, grad: Tensor, moment_parts: int, eps: float) -> Launch:
        """A launch for grad, h, its moments, z, weight, projection, and g, sums and partials, which it writes.

        g is the gradient of the normalised tensor; sums are those of g and of g * normalised, [groups, 2,
        sum_parts]; partials are gradients of weight, projection, bias and projection bias, [partials, length].
        """
        return Launch(
            norm_mlp_residual_backward,
            self.partials,
            self._images,
            self._blocks,
            self._rounds,
            moment_parts,
            self.sum_parts,
            eps,
            *strides(grad),
            BLOCK_INPUTS=16,
            **self._constants,
        )
