"""The least that a module costs: each tensor moved once, and the operations that the definition takes."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Elements moved, and operations; a multiplication with an addition counts as two."""

    elements: int
    flops: int

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.elements + other.elements, self.flops + other.flops)

    def times(self, count: int) -> Cost:
        return Cost(count * self.elements, count * self.flops)


def convolution(taps: int, outputs: int, pixels: int, vectors: int = 1) -> Cost:
    """The cost of a convolution's parameters, and of multiplying by them.

    Args:
        taps: inputs that each output sums.
        outputs: channels of the result.
        pixels: of the result, in all images.
        vectors: parameters of each output channel beside its taps: a bias, and perhaps a norm's scale and shift.
    """
    return Cost((taps + vectors) * outputs, 2 * pixels * taps * outputs)


def module(inputs: int, outputs: int, parameters: Cost, direction: str) -> Cost:
    """The cost of a module in a direction, one of `workloads.DIRECTIONS`.

    Forward reads inputs and parameters and writes outputs. Backward reads inputs, parameters and the outputs'
    gradient, writes the gradients of the first two, and multiplies twice as much.

    Args:
        inputs, outputs: elements of the maps.
        parameters: the sum of the module's `convolution`s.
    """
    forward = Cost(inputs + outputs + parameters.elements, parameters.flops)
    backward = Cost(2 * (inputs + parameters.elements) + outputs, 2 * parameters.flops)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def patches(images: int, inputs: int, outputs: int, patch: int, side: int, direction: str) -> Cost:
    """The cost of a convolution of patches of `patch` x `patch` pixels, to maps of `side` x `side`."""
    pixels, taps = images * side**2, inputs * patch**2
    return module(pixels * taps, pixels * outputs, convolution(taps, outputs, pixels), direction)
