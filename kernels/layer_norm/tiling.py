"""How the layer norm's kernels divide their work, and their launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common.launch import Launch, ceil_div, next_power_of_2
from ..common.layout import strides
from ..common.moments import NormGroups
from .kernels import norm_backward, norm_moments, norm_sums, normalise


class LayerNormTiling(NormGroups):
    """A program takes `block` elements of one of the maps x (N, C, H, W), which are normalised by groups.

    What is normalised may lie in memory otherwise than `x`: launches are given its strides.
    """

    def __init__(self, x: Tensor, norm: str, ranks_group: str | None = None) -> None:
        super().__init__(norm, x.shape[0], ranks_group)
        pixels = x.shape[2] * x.shape[3]
        length = x.shape[1] * pixels
        block = min(2048, next_power_of_2(length))
        blocks = ceil_div(length, block)
        self.programs = self.images * blocks
        self.parts = self.parts_of_group(in_batch=self.programs, in_image=blocks)
        self._constants: dict[str, Any] = {"PIXELS": pixels, "LENGTH": length, "NORM": norm, "BLOCK": block}

    def moments(self, x: Tensor) -> Launch:
        """A launch for x and its moments, which it writes."""
        return Launch(norm_moments, self.programs, self.images, self.parts, *strides(x), **self._constants)

    def normalise(self, x_strides: tuple[int, int, int], moment_parts: int, eps: float, y: Tensor) -> Launch:
        """A launch for x, its moments and y, which it writes."""
        return Launch(
            normalise,
            self.programs,
            self.images,
            moment_parts,
            eps,
            *x_strides,
            *strides(y),
            BLOCK_PARTS=self.block_parts,
            **self._constants,
        )

    def sums(self, grad: Tensor, x_strides: tuple[int, int, int], moment_parts: int, eps: float) -> Launch:
        """A launch for grad, x, its moments, and the sums of `new_sums`, which it writes."""
        return Launch(
            norm_sums,
            self.programs,
            self.images,
            moment_parts,
            self.parts,
            eps,
            *strides(grad),
            *x_strides,
            BLOCK_PARTS=self.block_parts,
            **self._constants,
        )

    def new_sums(self, moments: Tensor) -> Tensor:
        """Uninitialised sums of grad and of grad * normalised, [groups, 2, parts]."""
        return moments.new_empty(self.groups, 2, self.parts)

    def backward(
        self, grad: Tensor, x: Tensor, moment_parts: int, sum_parts: int, eps: float, grad_x: Tensor
    ) -> Launch:
        """A launch for grad, x, its moments, the sums, and the gradient of x, which it writes."""
        return Launch(
            norm_backward,
            self.programs,
            self.images,
            moment_parts,
            sum_parts,
            eps,
            *strides(grad),
            *strides(x),
            *strides(grad_x),
            BLOCK_PARTS=self.block_parts,
            **self._constants,
        )
