"""What tests of the operations share: shapes, random inputs, and the operations called with them."""

import torch

from fastconv.checking import inputs
from fastconv.checking.inputs import Sizes

# images, channels, height, width, multiplier, kernel
SHAPES = {
    "lecture 8x8": (12, 2, 8, 8, 4, (7, 7)),
    "lecture 4x4": (7, 3, 4, 4, 4, (7, 7)),
    "map smaller than the kernel": (7, 3, 2, 3, 3, (9, 5)),
    "one pixel": (2, 5, 1, 1, 3, (7, 7)),
    "one row": (3, 5, 1, 5, 1, (3, 3)),
    "one image": (1, 3, 7, 7, 2, (7, 7)),
    "odd and prime": (3, 3, 11, 7, 2, (5, 5)),
    "large map": (2, 5, 20, 17, 1, (7, 7)),
    "one tap": (5, 3, 6, 4, 3, (1, 1)),
}


def random_block(shape, affine=True, bias=True, dtype=torch.float64):
    """x and the parameters of a convnext_block, as NAMES names them."""
    shapes = inputs.shapes("convnext_block", Sizes(*shape), affine, bias).values()
    # Float32 values, so that all precisions compute with the same numbers.
    return [None if size is None else torch.randn(size).to(dtype) for size in shapes]


NAMES = tuple(inputs.shapes("convnext_block", Sizes(1, 1, 1, 1, 1, (1, 1))))


def block(module, norm="tensor", approximate="none", eps=1e-5):
    def call(*inputs):
        *positional, norm_weight, norm_bias = inputs
        return module.convnext_block(
            *positional,
            norm=norm,
            eps=eps,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            approximate=approximate,
        )

    return call


def depthwise(module, norm="tensor", eps=1e-5):
    def call(x, weight, bias, norm_weight, norm_bias):
        return module.depthwise_conv_layer_norm(
            x, weight, bias, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias
        )

    return call


def norm_alone(module, norm="tensor"):
    def call(x, norm_weight, norm_bias):
        return module.layer_norm(x, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias)

    return call
