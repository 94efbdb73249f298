"""The groups of a norm, and memory for what the kernels of `statistics` keep for each: the host's side of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import ranks
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
        ranks_group: the process group whose ranks each have a part of the one tensor, if any.
    """

    # How many parts of a group there are moments of: under torch.compile an expression of symbols.
    parts: int

    def __init__(self, norm: str, images: int, ranks_group: str | None = None) -> None:
        self.norm = norm
        self.images = images
        self.ranks_group = ranks_group
        self.groups = 1 if norm == "tensor" else images
        # How many parts of a group a program loads at once.
        self.block_parts = 512 if norm == "tensor" else 16

    def parts_of_group(self, in_batch: int, in_image: int) -> int:
        """The parts of a group, from those in the whole batch and those in each image, or block of images."""
        return in_batch if self.norm == "tensor" else in_image

    def new_moments(self, x: Tensor) -> Tensor:
        """Uninitialised moments [groups, 3, parts]."""
        return x.new_empty(self.groups, 3, self.parts, dtype=accumulator(x))

    def new_kept_moments(self, x: Tensor) -> Tensor:
        """Uninitialised moments as `finish_moments` leaves them for the backward."""
        if self.ranks_group is None:
            return self.new_moments(x)
        return x.new_empty(1, 3, ranks.place_in(self.ranks_group)[1], dtype=accumulator(x))

    def finish_moments(self, parts: int) -> CollapseParts | GatherMoments:
        """For the forward, from the moments of this process's parts to those that programs merge."""
        if self.ranks_group is None:
            return self.collapse_moments(parts)
        return GatherMoments(parts, self.ranks_group)

    def collapse_moments(self, parts: int) -> CollapseParts:
        """For the backward, from the moments that the forward kept."""
        return CollapseParts(collapse_moments, self.groups, parts)

    def finish_sums(self, parts: int, values: int) -> CollapseParts | AddRanks:
        """For the backward, from the sums of this process's parts, of so many `values`."""
        if self.ranks_group is None:
            return CollapseParts(collapse_sums, self.groups, parts)
        return AddRanks(parts, values, self.ranks_group)


class CollapseParts:
    """Merges the parts of each group, [groups, ..., parts], into one where there are more than `most`.

    The default is too many for every reader to merge.

    Attributes:
        parts: how many are left.
    """

    def __init__(self, kernel: Any, groups: int, parts: int, most: int = MAX_PARTS) -> None:
        self._launch = Launch(kernel, groups, parts, BLOCK_PARTS=512) if parts > most else None
        self.parts = parts if self._launch is None else 1

    def __call__(self, values: Tensor, moments: Tensor | None = None) -> Tensor:
        if self._launch is None:
            return values
        merged = values.new_empty(*values.shape[:2], 1)
        self._launch(values, merged)
        return merged


class GatherMoments:
    """From the moments [1, 3, parts] of this rank to those of all ranks, [1, 3, ranks]: as parts of one tensor.

    Attributes:
        parts: how many are left.
    """

    def __init__(self, parts: int, group: str) -> None:
        self._collapse, self._group = CollapseParts(collapse_moments, 1, parts, most=1), group
        _, self.parts = ranks.place_in(group)

    def __call__(self, moments: Tensor) -> Tensor:
        own = _one_part(self._collapse(moments))
        if own.is_meta:
            return own.new_empty(1, 3, self.parts)
        return ranks.gather_moments(own.flatten(), self._group).to(own.dtype)[None]


class AddRanks:
    """From the sums [1, 2, parts] of this rank to those of all ranks, [1, 2, 1].

    Programs divide them by the number of this rank's values; so they are scaled by that over the number of all.
    """

    parts = 1

    def __init__(self, parts: int, values: int, group: str) -> None:
        self._collapse = CollapseParts(collapse_sums, 1, parts, most=1)
        self._values, self._group = values, group

    def __call__(self, sums: Tensor, moments: Tensor) -> Tensor:
        """Args: moments: of all ranks, [1, 3, ranks]."""
        own = _one_part(self._collapse(sums))
        if own.is_meta:
            return own
        merged = ranks.merge_sums(own[0, 0, 0], own[0, 1, 0], self._group)
        share = self._values / moments[0, 0].double().sum()
        return (merged * share).to(own.dtype).view(1, 2, 1)


def _one_part(values: Tensor) -> Tensor:
    """Values [1, n, parts] of at most one part, as one; an empty tensor has none."""
    return values if values.shape[2] else values.new_zeros(1, values.shape[1], 1)
