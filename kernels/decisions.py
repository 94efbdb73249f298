"""Which form an operation takes on a GPU: the thresholds, and for each operation one function.

Imports no Triton, so that all of fastconv can ask.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .common.values import Convolution, Norm, span

# How the Triton backend computes an operation.
Form = Literal[
    # The block's own kernels.
    "block",
    # The block as one operation after the other.
    "parts",
    # A depthwise convolution as products with Toeplitz matrices, fused with the norm.
    "toeplitz",
    # A depthwise convolution from tap to tap; the norm follows.
    "stencil",
    # The same, fused with the norm of each pixel.
    "stencil channel norm",
    # A norm from the moments of many parts.
    "moments",
    # A norm of each pixel within one program.
    "channel norm",
    # A pointwise convolution fused with GELU.
    "pointwise",
    # A classifier's whole step of training, or evaluation, as a fixed list of launches.
    "plan",
    # PyTorch's own operations.
    "pytorch",
]

# Pixels of a map: on larger ones the convolution is a stencil, because a Toeplitz matrix has P^2 entries for each
# channel.
LARGEST_TOEPLITZ_MAP = 256
# Channels, or hidden channels, of a block: more do not fit the registers and the shared memory of one program.
WIDEST_BLOCK = 128
# Channels that one program can hold, for the norm of a pixel.
WIDEST_CHANNEL_NORM = 4096
# Inputs times outputs of a pointwise convolution. The products of larger weights take longer than the passes of
# GELU that the kernel saves, and the vendor's library multiplies faster. Worked out from the bytes and operations
# of ConvNeXt's stages on an H100; not measured.
LARGEST_POINTWISE = 192 * 768


def is_large(x: Tensor) -> bool:
    """Whether the maps are too large for Toeplitz matrices."""
    shape = x.shape
    return shape[2] * shape[3] > LARGEST_TOEPLITZ_MAP


def convnext_block(x: Tensor, pointwise: Convolution, norm: Norm) -> Form:
    too_wide = x.shape[1] > WIDEST_BLOCK or pointwise.weight.shape[0] > WIDEST_BLOCK
    return "parts" if _norms_pixels(norm) or too_wide or is_large(x) else "block"


def classifier(norm: str, width: int, pixels: int) -> Form:
    """How a whole Classifier is trained and evaluated: by `classifier.plan`, or part by part.

    Args:
        width: channels after the stem; there are twice as many after the downsampling.
        pixels: of a map after the stem.
    """
    too_wide = 2 * width > WIDEST_BLOCK
    return "parts" if norm != "tensor" or too_wide or pixels > LARGEST_TOEPLITZ_MAP else "plan"


def depthwise_conv_layer_norm(x: Tensor, depthwise: Convolution, norm: Norm) -> Form:
    if not _norms_pixels(norm):
        return "stencil" if is_large(x) else "toeplitz"
    return "stencil channel norm" if depthwise.weight.shape[0] <= WIDEST_CHANNEL_NORM else "stencil"


def layer_norm(x: Tensor, norm: Norm) -> Form:
    if not _norms_pixels(norm):
        return "moments"
    return "channel norm" if x.shape[1] <= WIDEST_CHANNEL_NORM else "pytorch"


def pointwise_conv_gelu(conv: Convolution) -> Form:
    return "pytorch" if conv.weight.numel() > LARGEST_POINTWISE else "pointwise"


def _norms_pixels(norm: Norm) -> bool:
    """Whether each pixel is normalised by itself; an unknown norm is not taken for another, but a ValueError."""
    return span(norm.over) == (1,)
