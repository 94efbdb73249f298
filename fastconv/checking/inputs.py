"""The inputs on which operations are compared with float64: their sizes, layouts and values, and their tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Sizes(NamedTuple):
    """Sizes of maps (images, channels, height, width), and of a depthwise convolution of them."""

    images: int
    channels: int
    height: int
    width: int
    multiplier: int
    kernel: tuple[int, int]


class Input(NamedTuple):
    """Sizes and values of maps and of the parameters that go with them.

    Args:
        layout: of the maps, one of `accuracy.FORMATS`.
        affine: whether norms scale and shift.
        bias: whether convolutions have biases.
        mean, scale: of the values that a norm is given: multiplied by `scale`, then moved by `mean`.
    """

    sizes: Sizes
    layout: str = "contiguous"
    affine: bool = False
    bias: bool = True
    mean: float = 0.0
    scale: float = 1.0


# At least one on each side of each case distinction in the code.
SQUARE = (7, 7)
INPUTS = {
    "8x8": Input(Sizes(16, 4, 8, 8, 4, SQUARE)),
    "8x8 channels_last": Input(Sizes(16, 4, 8, 8, 4, SQUARE), layout="channels_last", affine=True),
    "4x4 sliced": Input(Sizes(16, 5, 4, 4, 4, SQUARE), layout="sliced", affine=True),
    "11x7": Input(Sizes(3, 5, 11, 7, 2, (5, 5)), affine=True),
    "11x7 sliced, no bias": Input(Sizes(3, 5, 11, 7, 2, (5, 5)), layout="sliced", bias=False),
    "2x3 under a 9x5 kernel": Input(Sizes(7, 5, 2, 3, 3, (9, 5)), layout="batch_last"),
    "one 7x7 image": Input(Sizes(1, 4, 7, 7, 4, SQUARE), affine=True),
    # Not small either: see fastconv.operations.decisions.
    "17x19": Input(Sizes(8, 13, 17, 19, 3, SQUARE), affine=True),
    # E[x^2] - E[x]^2 has no digit left.
    "mean 1000 x std": Input(Sizes(16, 4, 8, 8, 4, SQUARE), mean=1000.0),
    # eps is not negligible beside the variance.
    "std 0.01": Input(Sizes(16, 4, 8, 8, 4, SQUARE), scale=0.01),
}
# The argument by which the mean of what a norm is given can be moved.
MOVED = {"layer_norm": "x", "depthwise_conv_layer_norm": "bias", "convnext_block": "depthwise_bias"}


def shapes(operation: str, sizes: Sizes, affine: bool = True, bias: bool = True) -> dict[str, Shape | None]:
    """The shapes of an operation's tensors by the names of its arguments; None for those that it goes without."""
    channels, wide = sizes.channels, sizes.channels * sizes.multiplier

    def convolution(prefix: str, *weight: int) -> dict[str, Shape | None]:
        return {f"{prefix}weight": weight, f"{prefix}bias": weight[:1] if bias else None}

    def norm(length: int) -> dict[str, Shape | None]:
        return dict.fromkeys(("norm_weight", "norm_bias"), (length,) if affine else None)

    parameters = {
        "layer_norm": norm(channels),
        "depthwise_conv_layer_norm": convolution("", wide, 1, *sizes.kernel) | norm(wide),
        # Neither as many channels as the maps have, nor as many as the depthwise convolution's.
        "pointwise_conv_gelu": convolution("", wide + 1, channels, 1, 1),
        "convnext_block": convolution("depthwise_", wide, 1, *sizes.kernel)
        | convolution("pointwise_", channels, wide, 1, 1)
        | convolution("projection_", channels, channels, 1, 1)
        | norm(wide),
        "patch_conv": convolution("", wide, channels, 2, 2),
    }
    return {"x": sizes[:4], **parameters[operation]}


def draw(operation: str, given: Input) -> dict[str, Tensor | None]:
    """Random float32 tensors for an operation, by the names of its arguments."""
    tensors: dict[str, Tensor | None] = {}
    for name, shape in shapes(operation, given.sizes, given.affine, given.bias).items():
        if shape is None:
            tensors[name] = None
        elif name == "x" or (name.endswith("bias") and name != "norm_bias"):
            mean = given.mean if name == MOVED.get(operation) else 0.0
            tensors[name] = torch.randn(shape) * given.scale + mean
        else:
            tensors[name] = draw_parameter(shape)
    return tensors


def draw_parameter(shape: Shape) -> Tensor:
    """A random vector, or a weight that keeps the variance of what it is multiplied with."""
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
