"""Room for the moments of a norm, which the kernels of `fastconv.kernels.common.statistics` write and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common.launch import Launch
from ..common.rules import accumulator
from ..common.statistics import collapse_moments, collapse_sums

# More than these are merged once, rather than by every program that needs them.
MAX_PARTS = 2048


class Normed:
    """Maps with a norm: one group of values is the whole tensor, or each of its images.

    Args:
        norm: "tensor" or "sample".
        images: of the batch.
    """

    # How many programs write a part of a group's moments: under torch.compile an expression of symbols.
    parts: int

    def __init__(self, norm: str, images: int) -> None:
        self.norm = norm
        self.images = images
        self.groups = 1 if norm == "tensor" else images
        # How many parts of a group a program loads at once.
        self.block_parts = 512 if norm == "tensor" else 16

    def new_moments(self, x: Tensor) -> Tensor:
        return x.new_empty(self.groups, 3, self.parts, dtype=accumulator(x))

    def collapse_moments(self, parts: int) -> Collapse:
        """Moments [groups, 3, parts] in one part, if there are too many."""
        return Collapse(collapse_moments, self.groups, parts)

    def collapse_sums(self, parts: int) -> Collapse:
        """The sums of a backward, [groups, 2, parts], in one part, if there are too many."""
        return Collapse(collapse_sums, self.groups, parts)


class Collapse:
    """Merges the parts of each group into one where there are too many for every reader to merge."""

    def __init__(self, kernel: Any, groups: int, parts: int) -> None:
        self._launch = Launch(kernel, groups, parts, BLOCK_PARTS=512) if parts > MAX_PARTS else None
        self.parts = parts if self._launch is None else 1

    def __call__(self, values: Tensor) -> Tensor:
        if self._launch is None:
            return values
        merged = values.new_empty(*values.shape[:2], 1)
        self._launch(values, merged)
        return merged
