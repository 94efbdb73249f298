"""The pointwise convolution followed by GELU, forward and backward, for any number of channels.

Rows are the pixels of all images, n * P + p. P is the number of pixels, I the channels of x, O those of y. The
gradient dz of what goes into GELU is never written: both kernels of the backward compute its tiles when they need
them.
"""

import triton
import triton.language as tl

from .activation import gelu, gelu_derivative
from .product import product, widen


@triton.jit
def image_and_pixel(block, PIXELS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Those of each row of a block: int64, [BLOCK_ROWS]."""
    first = block * BLOCK_ROWS
    # Only the first row takes a division of 64 bits.
    pixel = (first % PIXELS).to(tl.int32) + tl.arange(0, BLOCK_ROWS)
    return first // PIXELS + pixel // PIXELS, (pixel % PIXELS).to(tl.int64)


@triton.jit
def channel_range(first, BLOCK: tl.constexpr):
    """int64: a channel times its stride may exceed 2^31."""
    return (first + tl.arange(0, BLOCK)).to(tl.int64)


@triton.jit
def pointwise_gelu(
    x,  # (N, I, P), of any strides
    weight,  # [O, I]
    bias,  # [O]
    z,  # as y: what goes into GELU
    y,  # (N, O, P), of any strides
    images,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    y_image_stride,
    y_channel_stride,
    y_pixel_stride,
    PIXELS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """y = gelu(weight x + bias). Programs of the same rows follow each other, and find x in the cache."""
    OUTPUT_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    program = tl.program_id(0).to(tl.int64)
    n, p = image_and_pixel(program // OUTPUT_BLOCKS, PIXELS, BLOCK_ROWS)
    o = channel_range(program % OUTPUT_BLOCKS * BLOCK_OUTPUTS, BLOCK_OUTPUTS)
    inside = (n < images)[:, None]
    x_rows = n[:, None] * x_image_stride + p[:, None] * x_pixel_stride

    values = widen(tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), weight.dtype.element_ty))
    for first in range(0, INPUTS, BLOCK_INPUTS):
        i = channel_range(first, BLOCK_INPUTS)
        x_mask = inside & (i < INPUTS)[None, :]
        x_tile = tl.load(x + (x_rows + i[None, :] * x_channel_stride), mask=x_mask, other=0.0)
        w_mask = (i < INPUTS)[:, None] & (o < OUTPUTS)[None, :]
        w_tile = tl.load(weight + (o[None, :] * INPUTS + i[:, None]), mask=w_mask, other=0.0)  # [I, O]
        values += product(x_tile, w_tile, PRECISION)
    if HAS_BIAS:
        values += widen(tl.load(bias + o, mask=o < OUTPUTS, other=0.0))[None, :]

    mask = inside & (o < OUTPUTS)[None, :]
    offset = n[:, None] * y_image_stride + p[:, None] * y_pixel_stride + o[None, :] * y_channel_stride
    tl.store(z + offset, values.to(z.dtype.element_ty), mask=mask)
    tl.store(y + offset, gelu(values, APPROXIMATE).to(y.dtype.element_ty), mask=mask)


@triton.jit
def pointwise_gelu_backward_x(
    grad_y,  # (N, O, P), of any strides
    z,  # (N, O, P), of any strides
    weight,  # [O, I]
    grad_x,  # (N, I, P), of any strides
    images,
    grad_image_stride,
    grad_channel_stride,
    grad_pixel_stride,
    z_image_stride,
    z_channel_stride,
    z_pixel_stride,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    PIXELS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """grad_x = weight^T dz"""
    INPUT_BLOCKS: tl.constexpr = (INPUTS + BLOCK_INPUTS - 1) // BLOCK_INPUTS
    program = tl.program_id(0).to(tl.int64)
    n, p = image_and_pixel(program // INPUT_BLOCKS, PIXELS, BLOCK_ROWS)
    i = channel_range(program % INPUT_BLOCKS * BLOCK_INPUTS, BLOCK_INPUTS)
    inside = (n < images)[:, None]
    grad_rows = n[:, None] * grad_image_stride + p[:, None] * grad_pixel_stride
    z_rows = n[:, None] * z_image_stride + p[:, None] * z_pixel_stride

    values = widen(tl.zeros((BLOCK_ROWS, BLOCK_INPUTS), weight.dtype.element_ty))
    for first in range(0, OUTPUTS, BLOCK_OUTPUTS):
        o = channel_range(first, BLOCK_OUTPUTS)
        mask = inside & (o < OUTPUTS)[None, :]
        grad = tl.load(grad_y + (grad_rows + o[None, :] * grad_channel_stride), mask=mask, other=0.0)
        z_tile = tl.load(z + (z_rows + o[None, :] * z_channel_stride), mask=mask, other=0.0)
        grad_z = widen(grad) * gelu_derivative(widen(z_tile), APPROXIMATE)
        w_mask = (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :]
        w_tile = tl.load(weight + (o[:, None] * INPUTS + i[None, :]), mask=w_mask, other=0.0)  # [O, I]
        values += product(grad_z.to(w_tile.dtype), w_tile, PRECISION)

    offset = n[:, None] * x_image_stride + p[:, None] * x_pixel_stride + i[None, :] * x_channel_stride
    tl.store(grad_x + offset, values.to(grad_x.dtype.element_ty), mask=inside & (i < INPUTS)[None, :])


@triton.jit
def pointwise_gelu_backward_weight(
    grad_y,  # (N, O, P), of any strides
    z,  # (N, O, P), of any strides
    x,  # (N, I, P), of any strides
    partials,  # [parts, O * I + O]: gradients of weight and bias
    images,
    rounds,
    grad_image_stride,
    grad_channel_stride,
    grad_pixel_stride,
    z_image_stride,
    z_channel_stride,
    z_pixel_stride,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    PIXELS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """One tile of the weight's gradient, dz x^T, and some of the bias's, over `rounds` blocks of rows."""
    INPUT_BLOCKS: tl.constexpr = (INPUTS + BLOCK_INPUTS - 1) // BLOCK_INPUTS
    TILES: tl.constexpr = INPUT_BLOCKS * ((OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS)
    program = tl.program_id(0).to(tl.int64)
    part = program // TILES
    tile = program % TILES
    o = channel_range(tile // INPUT_BLOCKS * BLOCK_OUTPUTS, BLOCK_OUTPUTS)
    i = channel_range(tile % INPUT_BLOCKS * BLOCK_INPUTS, BLOCK_INPUTS)

    values = tl.zeros((BLOCK_OUTPUTS, BLOCK_INPUTS), partials.dtype.element_ty)
    bias = tl.zeros((BLOCK_OUTPUTS,), partials.dtype.element_ty)
    for round in range(rounds):
        n, p = image_and_pixel(part * rounds + round, PIXELS, BLOCK_ROWS)
        mask = (o < OUTPUTS)[:, None] & (n < images)[None, :]
        offset = (n * grad_image_stride + p * grad_pixel_stride)[None, :] + o[:, None] * grad_channel_stride
        grad = tl.load(grad_y + offset, mask=mask, other=0.0)  # [O, rows]
        offset = (n * z_image_stride + p * z_pixel_stride)[None, :] + o[:, None] * z_channel_stride
        z_tile = tl.load(z + offset, mask=mask, other=0.0)
        grad_z = widen(grad) * gelu_derivative(widen(z_tile), APPROXIMATE)
        offset = (n * x_image_stride + p * x_pixel_stride)[:, None] + i[None, :] * x_channel_stride
        x_mask = (n < images)[:, None] & (i < INPUTS)[None, :]
        x_tile = tl.load(x + offset, mask=x_mask, other=0.0)  # [rows, I]
        values += product(grad_z.to(x_tile.dtype), x_tile, PRECISION)
        bias += tl.sum(grad_z, 1)

    target = partials + part * (OUTPUTS * INPUTS + OUTPUTS)
    w_mask = (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :]
    tl.store(target + (o[:, None] * INPUTS + i[None, :]), values, mask=w_mask)
    # Programs of other inputs have summed the same.
    if tile % INPUT_BLOCKS == 0:
        tl.store(target + OUTPUTS * INPUTS + o, bias, mask=o < OUTPUTS)
