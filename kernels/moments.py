"""Room for the moments of a norm, which the kernels of `fastconv.kernels.statistics` write and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import accumulator, launch
from .statistics import collapse_moments, collapse_sums

# More than these are merged once, rather than by every program that needs them.
MAX_PARTS = 2048


class Normed:
    """Maps with a norm: one group of values is the whole tensor, or each of its images.

    Args:
        norm: "tensor" or "sample".
        images: of the batch.
    """

    def __init__(self, norm: str, images: int) -> None:
        self.norm = norm
        self.images = images
        self.groups = 1 if norm == "tensor" else images
        # How many parts of a group a program loads at once.
        self.block_parts = 512 if norm == "tensor" else 16

    @property
    def parts(self) -> int:
        """How many programs write a part of a group's moments: under torch.compile an expression of symbols."""
        raise NotImplementedError

    def new_moments(self, x: Tensor) -> Tensor:
        return x.new_empty(self.groups, 3, self.parts, dtype=accumulator(x))

    def collapse_moments(self, moments: Tensor) -> Tensor:
        """Moments [groups, 3, parts], in one part if there are too many."""
        return self._collapse(collapse_moments, moments)

    def collapse_sums(self, sums: Tensor) -> Tensor:
        """The sums of a backward, [groups, 2, parts], in one part if there are too many."""
        return self._collapse(collapse_sums, sums)

    def _collapse(self, kernel: Any, values: Tensor) -> Tensor:
        groups, rows, parts = values.shape
        if parts <= MAX_PARTS:
            return values
        merged = values.new_empty(groups, rows, 1)
        launch(kernel, groups, values, merged, parts, BLOCK_PARTS=512)
        return merged
