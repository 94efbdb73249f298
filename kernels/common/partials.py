"""Gradients of parameters, of which each program keeps its part, and the sum of the parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import Launch, ceil_div
from .reduction import sum_columns

# The most programs that keep partial gradients made by matrix products: about two for each multiprocessor of a
# large GPU.
MAX_PARTIALS = 256
# Narrow: a gradient has few columns for a large GPU, and each program reads one block of rows after the other.
BLOCK_ROWS, BLOCK_COLUMNS = 128, 32


def rounds_and_parts(blocks: int, programs: int) -> tuple[int, int]:
    """How many blocks a program takes, one after the other, and how many programs then take all of them.

    Args:
        programs: at most so many, and at least one.
    """
    rounds = max(1, ceil_div(blocks, max(1, programs)))
    return rounds, ceil_div(blocks, rounds)


class PartialSums:
    """Launches a kernel whose programs keep partial gradients; returns their sum, of `size`.

    The parts are summed in a fixed order: results repeat bit for bit.

    Args:
        launch: launches the kernel, whose last tensor is the partial gradients, [parts, *size].
        parts: how many there are.
        size: the gradient's size.
        dtype: the dtype of the gradient and of its parts.
        needed: if not, the kernel is given None for the parts, and the result is empty, [0, ...].
    """

    def __init__(
        self, launch: Launch, parts: int, size: tuple[int, ...], dtype: torch.dtype, needed: bool = True
    ) -> None:
        self._launch, self._size, self._dtype, self._needed = launch, (parts, *size), dtype, needed
        length = math.prod(size)
        self._sum = Launch(
            sum_columns,
            ceil_div(length, BLOCK_COLUMNS),
            parts,
            LENGTH=length,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
        )

    def __call__(self, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        if not self._needed:
            self._launch(grad, *tensors, None)
            return grad.new_empty((0, *self._size[2:]), dtype=self._dtype)
        partials = grad.new_empty(self._size, dtype=self._dtype)
        self._launch(grad, *tensors, partials)
        if self._size[0] == 1:
            return partials[0]
        result = partials.new_empty(self._size[1:])
        self._sum(partials, result)
        return result
