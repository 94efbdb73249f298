"""The sum of what programs kept of a gradient, each for itself."""

from __future__ import annotations

from torch import Tensor

from .launch import ceil_div, launch
from .reduction import sum_columns

# Narrow: a gradient has few columns for a large GPU, and each program reads one block of rows after the other.
BLOCK_ROWS, BLOCK_COLUMNS = 128, 32


def sum_partials(partials: Tensor) -> Tensor:
    """Over the first dimension, in a fixed order: results repeat bit for bit."""
    parts = partials.shape[0]
    if parts == 1:
        return partials[0]
    result = partials.new_empty(partials.shape[1:])
    launch(
        sum_columns,
        ceil_div(result.numel(), BLOCK_COLUMNS),
        partials,
        result,
        parts,
        LENGTH=result.numel(),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
    )
    return result
