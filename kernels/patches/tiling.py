"""How the patches' kernels divide their work, and their launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common.launch import Launch, block_size, ceil_div, next_power_of_2, precision
from ..common.moments import NormGroups
from ..common.partials import MAX_PARTIALS, rounds_and_parts
from .kernels import downsample_backward, downsample_forward, stem_backward, stem_forward

# About as many programs as a large GPU has multiprocessors. Each program of a backward writes a whole gradient of
# the parameters, which is read again to be summed: half as many programs move half as much.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 128, 64


class Blocks:
    """A batch's patches in blocks of 16 to 64, which are about `programs` if there are enough patches.

    Args:
        images: in the batch.
        patches: in an image.
    """

    def __init__(self, images: int, patches: int, programs: int) -> None:
        rows = block_size(images * patches // programs, 64)
        block_patches = min(rows, next_power_of_2(patches))
        block_images = rows // block_patches
        self.count = ceil_div(images, block_images) * ceil_div(patches, block_patches)
        self.constants = {"BLOCK_IMAGES": block_images, "BLOCK_PATCHES": block_patches}


class PatchTiling(NormGroups):
    """A program takes a block of patches, and all outputs.

    Args:
        batch: N, how many images.
        size: height and width of the maps that patches are cut out of; what fills no patch is left over.
        weight: (O, C, patch, patch)

    Attributes:
        pixels: P, of a map made of patches.
        length: of the gradients of weight and bias together.
    """

    def __init__(self, batch: int, size: tuple[int, int], weight: Tensor) -> None:
        super().__init__("tensor", batch)
        height, width = size
        self.outputs, channels, patch, _ = weight.shape
        inputs = channels * patch * patch
        self.pixels = (height // patch) * (width // patch)
        self.length = self.outputs * inputs + self.outputs
        self._forward_inputs = block_size(inputs, 64)
        # Registers hold each operand of float32 in two parts: larger blocks spill.
        self._backward_inputs = block_size(inputs, 16 if weight.element_size() > 2 else 64)
        self._constants: dict[str, Any] = {
            "INPUTS": inputs,
            "OUTPUTS": self.outputs,
            "HEIGHT": height,
            "WIDTH": width,
            "PATCH": patch,
            "PRECISION": precision(weight),
            "BLOCK_OUTPUTS": max(16, next_power_of_2(self.outputs)),
            "num_warps": 4 if self.outputs <= 64 else 8,
        }


class StemTiling(PatchTiling):
    """The convolution of a batch of images that are chosen by order and position, and the norm's moments.

    Args:
        images: uint8 (M, C, H, W)

    Attributes:
        parts: of the result's moments.
        partials: how many partial gradients of weight and bias there are.
    """

    def __init__(self, images: Tensor, batch: int, weight: Tensor) -> None:
        super().__init__(batch, (images.shape[2], images.shape[3]), weight)
        self._forward = Blocks(batch, self.pixels, FORWARD_PROGRAMS)
        self._backward = Blocks(batch, self.pixels, BACKWARD_PROGRAMS)
        self.parts = self._forward.count
        self._rounds, self.partials = rounds_and_parts(self._backward.count, MAX_PARTIALS)

    def forward(self) -> Launch:
        """A launch for images, order, position, weight, bias, y [N, O, P] and its moments; writes the last two.

        order is int64 [count], the numbers of images, and position int64 [1], where in it the batch starts.
        """
        return Launch(
            stem_forward,
            self.parts,
            self.images,
            self.parts,
            BLOCK_INPUTS=self._forward_inputs,
            **self._constants,
            **self._forward.constants,
        )

    def backward(self, moment_parts: int, sum_parts: int, eps: float) -> Launch:
        """A launch for images, order, position, grad, y, moments, sums and partials, which it writes.

        grad is the gradient of the normalised y; sums are those of grad and of grad * normalised; partials are
        gradients of weight and bias, [partials, length].
        """
        return Launch(
            stem_backward,
            self.partials,
            self.images,
            self._rounds,
            moment_parts,
            sum_parts,
            eps,
            BLOCK_PARTS=self.block_parts,
            BLOCK_INPUTS=self._backward_inputs,
            **self._constants,
            **self._backward.constants,
        )


class DownsampleTiling(PatchTiling):
    """The convolution of normalised maps.

    Args:
        x: (N, C, H, W)

    Attributes:
        partials: how many partial gradients of weight and bias there are, and parts of the backward's sums.
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        images, _, height, width = x.shape
        super().__init__(images, (height, width), weight)
        patch = weight.shape[2]
        # Those that the edge cuts are covered too, because the gradient of their pixels is 0.
        covering = ceil_div(height, patch) * ceil_div(width, patch)
        self._forward = Blocks(images, self.pixels, FORWARD_PROGRAMS)
        self._backward = Blocks(images, covering, BACKWARD_PROGRAMS)
        self._rounds, self.partials = rounds_and_parts(self._backward.count, MAX_PARTIALS)

    def forward(self, moment_parts: int, eps: float) -> Launch:
        """A launch for x [N, C, H, W], its moments, weight, bias and y [N, O, P], which it writes."""
        return Launch(
            downsample_forward,
            self._forward.count,
            self.images,
            moment_parts,
            eps,
            BLOCK_PARTS=self.block_parts,
            BLOCK_INPUTS=self._forward_inputs,
            **self._constants,
            **self._forward.constants,
        )

    def backward(self, moment_parts: int, eps: float) -> Launch:
        """A launch for the gradient of y, x, its moments, weight, and g, sums and partials, which it writes.

        g is the gradient of the normalised maps, like x; sums are those of g and of g * normalised, [1, 2,
        partials]; partials are gradients of weight and bias, [partials, length].
        """
        return Launch(
            downsample_backward,
            self.partials,
            self.images,
            self._rounds,
            moment_parts,
            self.partials,
            eps,
            BLOCK_PARTS=self.block_parts,
            BLOCK_INPUTS=self._backward_inputs,
            **self._constants,
            **self._backward.constants,
        )
