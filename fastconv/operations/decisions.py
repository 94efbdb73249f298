"""Which form an operation takes on a CPU: the measured thresholds, and for each operation one function.

`bench/NOTES.md` has the measurements.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastconv.kernels.common.values import Convolution, Norm

# How the portable backend computes an operation; `columns.py` explains the two layouts of columns.
Form = Literal[
    # PyTorch's own operations, on the maps as they come.
    "pytorch",
    # PyTorch's own operations, on channels_last maps.
    "pytorch channels last",
    # The same, but the convolution is a Toeplitz product, which writes channels_last maps.
    "toeplitz channels last",
    # Columns in batch-last: the convolution is a Toeplitz product.
    "batch last",
    # Columns in channels-last: the convolution is PyTorch's.
    "channels last",
]

# Toeplitz products. The matrix has P^2 entries for each output channel, where P is a map's number of pixels.
# Measured with `python -m bench.tools.crossover`.
TOEPLITZ_MAX_PIXELS = 144  # On larger maps PyTorch's convolution is faster.
TOEPLITZ_ALWAYS_PIXELS = 49  # On maps up to this size the product is faster, whatever the batch.
TOEPLITZ_MAX_ENTRIES_PER_IMAGE = 400  # Between the two the batch must be large enough for the P^2 entries.

# Small inputs, on which PyTorch's own operations are faster because they are fewer.
SMALL_BATCH_PIXELS_PER_IMAGE = 12  # A Toeplitz product needs at least one image for so many pixels of a map.
SMALL_CONVOLUTION = 2**16  # Elements of the convolution's output, in channels-last.
SMALL_BLOCK = 2**15  # Elements of the block's widest maps, in channels-last.

# Norm "channel" with multiplier 1, in training: the gradients of PyTorch's channels_last convolution are slow
# on small maps. Without gradients a Toeplitz product is faster for one pixel alone.
CHANNELWISE_ALWAYS_PIXELS = 16  # On maps up to this size the Toeplitz product is faster, whatever the batch.
CHANNELWISE_MAX_PIXELS = 49  # Between the two the batch must be large enough.
CHANNELWISE_PIXELS_PER_IMAGE = 3  # Large enough is one image for so many pixels of a map.

# Swapped modules, which run fused where PyTorch's own operations are slow.
SEVERAL_IMAGES = 8  # From here on they are slow on plain (NCHW) maps of few pixels, and on any of one pixel.
SLOW_PIXELS = 4  # Few pixels are at most these.
SLOW_ELEMENTS = 2**16  # In training they are slow on plain maps of at least so many elements.

# The native kernels.
NATIVE_IMAGES = 4  # Of medium maps. With fewer images most lanes of a vector are empty.
NATIVE_PATCH_IMAGES = 8  # With fewer, PyTorch's product of patches is as fast.
NATIVE_LANES, NATIVE_FILLED = 16, 0.75  # With fewer lanes of pixels filled, PyTorch's own product is faster.
NATIVE_WEIGHTS_PER_PATCH = 64  # With more, PyTorch's own product uses the caches better.
NATIVE_SMALL = 2**15  # Elements of maps, and of weights, up to which the fewer calls count more than either.
NATIVE_IMAGES_OF_LARGE_MAPS = 8  # Of which PyTorch's own convolution is faster than of small ones.
NATIVE_ALWAYS_PIXELS = 64  # The convolution of maps up to this size is faster, whatever the batch.
NATIVE_MEDIUM_PIXELS = 256  # Beyond this size maps are large.


def native_convolution(x: Tensor) -> bool:
    """Whether the C++ kernels of a depthwise convolution are faster than the portable path."""
    images, _, height, width = x.shape
    pixels = height * width
    if pixels <= NATIVE_ALWAYS_PIXELS:
        return True
    return images >= (NATIVE_IMAGES if pixels <= NATIVE_MEDIUM_PIXELS else NATIVE_IMAGES_OF_LARGE_MAPS)


def native_patch_conv(x: Tensor, conv: Convolution) -> bool:
    """Whether a C++ kernel computes it; its results are in batch-last."""
    images, _, height, width = x.shape
    _, _, patch_height, patch_width = conv.weight.shape
    patches = images * (height // patch_height) * (width // patch_width)
    worth_packing = conv.weight.numel() <= NATIVE_WEIGHTS_PER_PATCH * patches
    return images >= NATIVE_PATCH_IMAGES and worth_packing and patch_conv(x, conv) == "batch last"


def native_pointwise_conv_gelu(x: Tensor, conv: Convolution) -> bool:
    """Whether a C++ kernel computes it."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return False
    images, _, height, width = x.shape
    pixels, weights = height * width, conv.weight.numel()
    vectors = (pixels + NATIVE_LANES - 1) // NATIVE_LANES
    filled = has_images_side_by_side(x) or pixels >= NATIVE_FILLED * vectors * NATIVE_LANES
    few_calls = images >= NATIVE_IMAGES and weights <= NATIVE_SMALL
    few_weights = weights <= NATIVE_WEIGHTS_PER_PATCH * images * pixels
    return (filled or x.numel() <= NATIVE_SMALL) and (few_calls or few_weights)


def has_images_side_by_side(x: Tensor) -> bool:
    """Whether the lanes of a pointwise convolution are images, of maps in batch-last; else they are pixels."""
    return not x.is_contiguous() and x.permute(1, 2, 3, 0).is_contiguous()


def layer_norm(x: Tensor, norm: Norm) -> Form:
    if norm.over == "channel":
        return "pytorch channels last"
    return layout(x.shape[0], x.shape[2] * x.shape[3])


def depthwise_conv_layer_norm(x: Tensor, depthwise: Convolution, norm: Norm) -> Form:
    return _convolution_and_norm(x, depthwise, norm, SMALL_CONVOLUTION)


def convnext_block(x: Tensor, depthwise: Convolution, norm: Norm) -> Form:
    return _convolution_and_norm(x, depthwise, norm, SMALL_BLOCK)


def pointwise_conv_gelu(x: Tensor) -> Form:
    if x.is_contiguous():
        # Bringing the maps into another layout and back takes longer than the product.
        return "pytorch"
    if x.is_contiguous(memory_format=torch.channels_last):
        return "channels last"
    return layout(x.shape[0], x.shape[2] * x.shape[3])


def patch_conv(x: Tensor, conv: Convolution) -> Form:
    """The layout of the result, in which the next operation takes it."""
    height, width = conv.weight.shape[2:]
    return layout(x.shape[0], x.shape[2] // height * (x.shape[3] // width))


def layout(images: int, pixels: int) -> Form:
    """The layout of columns: batch-last if maps are small and many enough for Toeplitz products."""
    served = pixels <= TOEPLITZ_ALWAYS_PIXELS or pixels**2 <= TOEPLITZ_MAX_ENTRIES_PER_IMAGE * images
    return "batch last" if pixels <= TOEPLITZ_MAX_PIXELS and served else "channels last"


def _convolution_and_norm(x: Tensor, depthwise: Convolution, norm: Norm, small: int) -> Form:
    images, channels, height, width = x.shape
    pixels, outputs = height * width, depthwise.weight.shape[0]
    if norm.over == "channel" and outputs == channels:
        toeplitz = _channelwise_toeplitz_pays(images, pixels)
        return "toeplitz channels last" if toeplitz else "pytorch channels last"
    if layout(images, pixels) == "batch last":
        few = pixels > SMALL_BATCH_PIXELS_PER_IMAGE * images
        return "pytorch" if few and norm.group is None else "batch last"
    if norm.over == "channel":
        return "pytorch channels last"
    # PyTorch's own norm knows no other ranks.
    return "pytorch" if images * outputs * pixels <= small and norm.group is None else "channels last"


def _channelwise_toeplitz_pays(images: int, pixels: int) -> bool:
    if not torch.is_grad_enabled():
        return pixels == 1
    served = pixels <= min(CHANNELWISE_MAX_PIXELS, CHANNELWISE_PIXELS_PER_IMAGE * images)
    return pixels <= CHANNELWISE_ALWAYS_PIXELS or served


def swapping_pays(x: Tensor) -> bool:
    """Whether depthwise convolution + norm "channel" of `x` is faster here than a module's own operations.

    Other maps take as long either way: ours become channels_last, in which PyTorch's own operations are as fast.
    """
    images, _, height, width = x.shape
    pixels = height * width
    plain = not x.is_contiguous(memory_format=torch.channels_last)
    if images >= SEVERAL_IMAGES and pixels <= (SLOW_PIXELS if plain else 1):
        return True
    if not plain or not torch.is_grad_enabled() or x.numel() < SLOW_ELEMENTS:
        return False
    return pixels > CHANNELWISE_MAX_PIXELS or _channelwise_toeplitz_pays(images, pixels)
