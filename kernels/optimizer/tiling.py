"""How the kernels that end a step divide their work, the workspace of partial gradients, and the launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import Launch, block_size, ceil_div, next_power_of_2
from .kernels import adamw, end_evaluation, reduce_step

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128
# Partial gradients are aligned to so many elements of the workspace: in float32, to a line of the cache.
ALIGNMENT = 32
# Elements of the flat vectors that a program of AdamW takes.
BLOCK_ELEMENTS = 512


class Columns(NamedTuple):
    """Partial gradients [rows, length], of which the columns are summed."""

    rows: int
    length: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.rows, self.length)]

    @property
    def programs(self) -> int:
        return ceil_div(self.length, BLOCK_COLUMNS)

    @property
    def loads(self) -> int:
        """Elements that a program loads."""
        return self.rows * min(self.length, BLOCK_COLUMNS)


class Matrices(NamedTuple):
    """Partial gradients of Toeplitz matrices [blocks, outputs, P, P] and of biases [blocks, outputs].

    The matrices are folded onto the taps of a convolution. The sums are [outputs, taps], then [outputs].
    """

    blocks: int
    outputs: int
    map: tuple[int, int]
    kernel: tuple[int, int]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        pixels = math.prod(self.map)
        return [(self.blocks, self.outputs, pixels, pixels), (self.blocks, self.outputs)]

    @property
    def length(self) -> int:
        return self.outputs * math.prod(self.kernel) + self.outputs

    @property
    def programs(self) -> int:
        return self.outputs

    @property
    def loads(self) -> int:
        """Elements that a program loads."""
        return self.blocks * math.prod(self.map) * math.prod(self.kernel)

    @property
    def geometry(self) -> tuple[int, ...]:
        """Constants of `fold_onto_taps`, in its order."""
        block_taps, block_pixels = (block_size(math.prod(size), 64) for size in (self.kernel, self.map))
        return *self.map, *self.kernel, block_taps, block_pixels


class StepReduction:
    """Sums the partial gradients of all parameters in one launch, which also does the step's bookkeeping.

    Each sum is taken in a fixed order: results repeat bit for bit.

    Args:
        partials: in the order of the parameters: their sums, one after the other, are the gradients.

    Attributes:
        size: elements of the workspace, a vector that holds all partial gradients.
        length: L, elements of the gradients.
    """

    def __init__(self, partials: Sequence[Columns | Matrices]) -> None:
        self._partials = partials
        self._geometries = tuple(dict.fromkeys(part.geometry for part in partials if isinstance(part, Matrices)))
        self._sums = sum(part.programs for part in partials)
        self.size, self.length = 0, 0
        # Where each part starts in the workspace, and where its sums start in the gradients.
        self._starts: list[tuple[int, int]] = []
        for part in partials:
            self._starts.append((self.size, self.length))
            self.size += ceil_div(sum(map(math.prod, part.shapes)), ALIGNMENT) * ALIGNMENT
            self.length += part.length

    def views(self, workspace: Tensor) -> list[tuple[Tensor, ...]]:
        """The views of a workspace [size] that kernels write, for each part: (columns,), or (matrices, biases)."""
        views = []
        for part, (start, _) in zip(self._partials, self._starts, strict=True):
            sizes = [math.prod(shape) for shape in part.shapes]
            vectors = workspace[start : start + sum(sizes)].split(sizes)
            views.append(tuple(vector.view(shape) for vector, shape in zip(vectors, part.shapes, strict=True)))
        return views

    def table(self) -> Tensor:
        """What each program sums, int64 [sums, 6].

        A row is: 0 for columns, or the number of the matrices' geometry, from 1 on; where the part starts in the
        workspace; its rows or blocks; its columns or outputs; which block of columns, or which output, the program
        takes; where the part's sums start in the gradients.
        """
        # The longest programs first, so that none is left to run alone. Equal ones keep the order of parameters:
        # what the backward wrote last, and the cache still holds, comes first.
        parts = sorted(zip(self._partials, self._starts, strict=True), key=lambda item: -item[0].loads)
        rows = []
        for part, (source, destination) in parts:
            kind = 1 + self._geometries.index(part.geometry) if isinstance(part, Matrices) else 0
            count, length = part[:2]
            rows += [(kind, source, count, length, number, destination) for number in range(part.programs)]
        return torch.tensor(rows)

    def launch(self, parts: int, images: int, batch: int, parameters: int) -> Launch:
        """A launch for workspace, table, losses, correct, position, gradients, step_losses, total_correct, steps.

        It writes gradients [L], and the mean loss into step_losses[position // batch]. It adds the correct answers
        to total_correct int64 [1], and 1 to each of AdamW's counters of steps [parameters].

        Args:
            parts: of losses and correct, HeadTiling's `programs`.
            images: in this batch.
            batch: images of each batch of the epoch, but perhaps the last.
            parameters: how many tensors of parameters have a counter.
        """
        return Launch(
            reduce_step,
            self._sums + 1,
            self._sums,
            parts,
            images,
            batch,
            parameters,
            GEOMETRIES=self._geometries,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            BLOCK_OUTCOME=next_power_of_2(parts),
            BLOCK_PARAMETERS=next_power_of_2(parameters),
        )


def end_evaluation_launch(parts: int, images: int, batch: int) -> Launch:
    """A launch for losses, correct, position, step_losses and total_correct int64 [1].

    It writes the mean loss into step_losses[position // batch], adds the correct answers to total_correct, and
    `images` to position, for the next batch.

    Args:
        parts: of losses and correct, HeadTiling's `programs`.
        images: in this batch.
        batch: images of each batch of the evaluation, but perhaps the last.
    """
    return Launch(end_evaluation, 1, parts, images, batch, BLOCK_OUTCOME=next_power_of_2(parts))


def adamw_launch(length: int, images: int, has_rounded: bool) -> Launch:
    """A launch for parameters, gradients, exp_avg, exp_avg_sq, steps, hyperparameters, rounded and position.

    A step of AdamW (Loshchilov and Hutter, arXiv:1711.05101): it writes parameters, both moments, and the rounded
    copy of the parameters. It adds `images` to position, for the next batch.

    Args:
        length: L, of parameters, gradients, moments and rounded. Accesses are wide if it is a multiple of 16.
        images: in this batch.
        has_rounded: if not, rounded is None.
    """
    programs = ceil_div(length, BLOCK_ELEMENTS)
    return Launch(adamw, programs, length, images, HAS_ROUNDED=has_rounded, BLOCK=BLOCK_ELEMENTS)


def adamw_hyperparameters(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Tensor:
    """float64 [5]: a tensor, so that launches of a captured graph take what is written to it later."""
    return torch.tensor([lr, beta1, beta2, eps, weight_decay], dtype=torch.float64)
