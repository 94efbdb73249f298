"""The groups of a norm, and memory for what the kernels of `statistics` keep for each: the host's side of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import Launch
from .rules import accumulator
from .statistics import collapse_moments, collapse_sums

# If a group has more parts than these, they are merged once, rather than by every program that needs them.
MAX_PARTS = 2048


class NormGroups:
    """Maps that are normalised by groups: the whole tensor is one, or each of its images.

    Programs each write the statistics of one part of a group.

    Args:
        norm: "tensor" or "sample".
        images: in the batch.
    """

    # How many parts of a group there are moments of: under torch.compile an expression of symbols.
    parts: int

    def __init__(self, norm: str, images: int) -> None:
        self.norm = norm
        self.images = images
        self.groups = 1 if norm == "tensor" else images
        # How many parts of a group a program loads at once.
        self.block_parts = 512 if norm == "tensor" else 16

    def parts_of_group(self, in_batch: int, in_image: int) -> int:
        """The parts of a group, from those in the whole batch and those in each image, or block of images."""
        return in_batch if self.norm == "tensor" else in_image

    def new_moments(self, x: Tensor) -> Tensor:
        """Uninitialised moments [groups, 3, parts]."""
        return x.new_empty(self.groups, 3, self.parts, dtype=accumulator(x))

    def collapse_moments(self, parts: int) -> CollapseParts:
        return CollapseParts(collapse_moments, self.groups, parts)

    def collapse_sums(self, parts: int) -> CollapseParts:
        return CollapseParts(collapse_sums, self.groups, parts)


class CollapseParts:
    """Merges the parts of each group, [groups, ..., parts], into one where there are too many for every reader.

    Attributes:
        parts: how many are left.
    """

    def __init__(self, kernel: Any, groups: int, parts: int) -> None:
        self._launch = Launch(kernel, groups, parts, BLOCK_PARTS=512) if parts > MAX_PARTS else None
        self.parts = parts if self._launch is None else 1

    def __call__(self, values: Tensor) -> Tensor:
        if self._launch is None:
            return values
        merged = values.new_empty(*values.shape[:2], 1)
        self._launch(values, merged)
        return merged
