"""Layer norm of a whole tensor or of each image, forward and backward, from its moments.

One program takes one image and BLOCK of its K * P elements, which lie at any strides of image, channel and pixel.
"""

import triton
import triton.language as tl

from ..common.product import widen
from ..common.statistics import (
    mean_and_scale,
    merge_sums,
    part_of_group,
    start_of_group,
    store_moments,
    store_sums,
    values_in_group,
)


@triton.jit
def elements_of_program(LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """(its block's number in the batch, and in its image, the image, the elements, and which of them exist)."""
    BLOCKS: tl.constexpr = (LENGTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    image = program // BLOCKS
    block = program % BLOCKS
    element = block * BLOCK + tl.arange(0, BLOCK)
    return program, block, image, element, element < LENGTH


@triton.jit
def element_offset(element, image, image_stride, channel_stride, pixel_stride, PIXELS: tl.constexpr):
    return image * image_stride + element // PIXELS * channel_stride + element % PIXELS * pixel_stride


@triton.jit
def norm_moments(
    x,  # (N, K, P), of any strides
    moments,  # [groups, 3, parts]
    images,
    parts,
    image_stride,
    channel_stride,
    pixel_stride,
    PIXELS: tl.constexpr,
    LENGTH: tl.constexpr,  # K * P
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    in_batch, in_image, image, element, inside = elements_of_program(LENGTH, BLOCK)
    offset = element_offset(element, image, image_stride, channel_stride, pixel_stride, PIXELS)
    values = widen(tl.load(x + offset, mask=inside, other=0.0))
    part = part_of_group(in_batch, in_image, NORM)
    store_moments(values, inside, moments, image, images, part, parts, NORM)


@triton.jit
def normalise(
    x,  # (N, K, P), of any strides
    moments,  # [groups, 3, parts]
    y,  # (N, K, P), of any strides
    images,
    parts,
    eps,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    y_image_stride,
    y_channel_stride,
    y_pixel_stride,
    PIXELS: tl.constexpr,
    LENGTH: tl.constexpr,  # K * P
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """y = (x - mean) / sqrt(variance + eps)"""
    _, _, image, element, inside = elements_of_program(LENGTH, BLOCK)
    mean, scale = mean_and_scale(moments, image, images, parts, eps, NORM, BLOCK_PARTS)
    offset = element_offset(element, image, x_image_stride, x_channel_stride, x_pixel_stride, PIXELS)
    values = (widen(tl.load(x + offset, mask=inside, other=0.0)) - mean) * scale
    offset = element_offset(element, image, y_image_stride, y_channel_stride, y_pixel_stride, PIXELS)
    tl.store(y + offset, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_sums(
    grad,  # (N, K, P), of any strides: gradient of the normalised tensor
    x,  # (N, K, P), of any strides
    moments,  # [groups, 3, parts]
    sums,  # [groups, 2, sum_parts]: sums of grad, and of grad * normalised
    images,
    parts,
    sum_parts,
    eps,
    grad_image_stride,
    grad_channel_stride,
    grad_pixel_stride,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    PIXELS: tl.constexpr,
    LENGTH: tl.constexpr,  # K * P
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    in_batch, in_image, image, element, inside = elements_of_program(LENGTH, BLOCK)
    mean, scale = mean_and_scale(moments, image, images, parts, eps, NORM, BLOCK_PARTS)
    offset = element_offset(element, image, x_image_stride, x_channel_stride, x_pixel_stride, PIXELS)
    normalised = (widen(tl.load(x + offset, mask=inside, other=0.0)) - mean) * scale
    offset = element_offset(element, image, grad_image_stride, grad_channel_stride, grad_pixel_stride, PIXELS)
    values = widen(tl.load(grad + offset, mask=inside, other=0.0))
    part = part_of_group(in_batch, in_image, NORM)
    store_sums(values, values * normalised, sums, image, images, part, sum_parts, NORM)


@triton.jit
def norm_backward(
    grad,  # (N, K, P), of any strides: gradient of the normalised tensor
    x,  # (N, K, P), of any strides
    moments,  # [groups, 3, parts]
    sums,  # [groups, 2, sum_parts]: sums of grad, and of grad * normalised
    grad_x,  # (N, K, P), of any strides
    images,
    parts,
    sum_parts,
    eps,
    grad_image_stride,
    grad_channel_stride,
    grad_pixel_stride,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    grad_x_image_stride,
    grad_x_channel_stride,
    grad_x_pixel_stride,
    PIXELS: tl.constexpr,
    LENGTH: tl.constexpr,  # K * P
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """grad_x = scale (grad - mean(grad) - normalised * mean(grad * normalised))"""
    _, _, image, element, inside = elements_of_program(LENGTH, BLOCK)
    mean, scale = mean_and_scale(moments, image, images, parts, eps, NORM, BLOCK_PARTS)
    start = start_of_group(sums, image, images, 2 * sum_parts, NORM)
    grad_sum, slope_sum = merge_sums(start, sum_parts, BLOCK_PARTS)
    count = values_in_group(LENGTH, images, NORM)
    offset = element_offset(element, image, x_image_stride, x_channel_stride, x_pixel_stride, PIXELS)
    normalised = (widen(tl.load(x + offset, mask=inside, other=0.0)) - mean) * scale
    offset = element_offset(element, image, grad_image_stride, grad_channel_stride, grad_pixel_stride, PIXELS)
    values = widen(tl.load(grad + offset, mask=inside, other=0.0))
    values = scale * (values - grad_sum / count - normalised * (slope_sum / count))
    offset = element_offset(
        element, image, grad_x_image_stride, grad_x_channel_stride, grad_x_pixel_stride, PIXELS
    )
    tl.store(grad_x + offset, values.to(grad_x.dtype.element_ty), mask=inside)
