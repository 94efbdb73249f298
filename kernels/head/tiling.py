"""How the head's kernel divides its work, and its launches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.launch import Launch, next_power_of_2
from ..common.partials import MAX_PARTIALS, rounds_and_parts
from ..common.rules import accumulator
from .kernels import head

# The most elements of a tile, so that it stays in registers.
TILE = 4096


class HeadTiling:
    """A program takes one image after the other, and all of its pixels, channels and classes.

    The labels of a batch are those of images order[position : position + N].

    Args:
        x: (N, C, H, W) or (N, C, P), contiguous.
        classes: how many there are.

    Attributes:
        programs: rows of partial gradients, and parts of the losses and of the correct answers.
        length: columns of partial gradients: those of weight [classes, C], then those of bias.
    """

    def __init__(self, x: Tensor, classes: int) -> None:
        (self._images, channels), pixels = x.shape[:2], math.prod(x.shape[2:])
        self._rounds, self.programs = rounds_and_parts(self._images, MAX_PARTIALS)
        self.length = classes * channels + classes
        block_classes, block_pixels = next_power_of_2(classes), min(64, next_power_of_2(pixels))
        self._constants = {
            "CLASSES": classes,
            "CHANNELS": channels,
            "PIXELS": pixels,
            "BLOCK_CLASSES": block_classes,
            "BLOCK_CHANNELS": min(next_power_of_2(channels), max(1, TILE // max(block_classes, block_pixels))),
            "BLOCK_PIXELS": block_pixels,
        }

    def new_outcome(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialised sums of losses, and counts of correct answers: each [programs]."""
        losses = x.new_empty(self.programs, dtype=accumulator(x))
        return losses, x.new_empty(self.programs, dtype=torch.int32)

    def forward_backward(self) -> Launch:
        """A launch for x, weight, bias, labels, order, position, losses, correct, grad_x and partials.

        It writes the last four: each program's sum of losses, and count of correct answers; the gradient of x, and
        partial gradients [programs, length], both of the mean of the losses.
        """
        return self._launch(has_gradients=True)

    def evaluate(self) -> Launch:
        """The same without gradients: grad_x and partials are None."""
        return self._launch(has_gradients=False)

    def _launch(self, has_gradients: bool) -> Launch:
        # Several threads hold the same logit, and add the same products. Where the compiler fuses a product with
        # the sum, each leaves another product unrounded: the logits differ, and which is stored is undefined.
        return Launch(
            head,
            self.programs,
            self._images,
            self._rounds,
            HAS_GRADIENTS=has_gradients,
            enable_fp_fusion=False,
            **self._constants,
        )
