"""The sum of what programs kept of a gradient, each for itself."""

from __future__ import annotations

from torch import Tensor

from .launch import Launch, ceil_div
from .reduction import sum_columns

# Narrow: a gradient has few columns for a large GPU, and each program reads one block of rows after the other.
BLOCK_ROWS, BLOCK_COLUMNS = 128, 32


class SumPartials:
    """Sums [parts, ...] over the first dimension, in a fixed order: results repeat bit for bit.

    Args:
        parts: how many are summed.
        length: elements of a part.
    """

    def __init__(self, parts: int, length: int) -> None:
        self._launch = Launch(
            sum_columns,
            ceil_div(length, BLOCK_COLUMNS),
            parts,
            LENGTH=length,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
        )

    def __call__(self, partials: Tensor) -> Tensor:
        if partials.shape[0] == 1:
            return partials[0]
        result = partials.new_empty(partials.shape[1:])
        self._launch(partials, result)
        return result
