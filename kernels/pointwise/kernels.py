"""The pointwise convolution followed by GELU, forward and backward, for any number of channels.

Rows are the pixels of all images, n * P + p. P is the number of pixels, I the channels of x, O those of y.

The forward keeps GELU's slope, its derivative at what goes into it, rather than what goes into it: the gradient
grad_z = grad_y * slope is then one multiplication, which both kernels of the backward repeat in every tile, where
the derivative itself would take more instructions than the matrix products.
"""

import triton
import triton.language as tl

from ..common.activation import gelu, gelu_derivative
from ..common.product import product, widen


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
    slope,  # as y
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
    HAS_BIAS: tl.constexpr,
    KEEP_SLOPE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
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
    if KEEP_SLOPE:
        derivative = gelu_derivative(values, APPROXIMATE)
        tl.store(slope + offset, derivative.to(slope.dtype.element_ty), mask=mask)
    tl.store(y + offset, gelu(values, APPROXIMATE).to(y.dtype.element_ty), mask=mask)


@triton.jit
def pointwise_gelu_backward_x(
    grad_y,  # (N, O, P), of any strides
    slope,  # (N, O, P), of any strides
    weight,  # [O, I]
    grad_x,  # (N, I, P), of any strides
    images,
    grad_image_stride,
    grad_channel_stride,
    grad_pixel_stride,
    slope_image_stride,
    slope_channel_stride,
    slope_pixel_stride,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    PIXELS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """grad_x = weight^T grad_z"""
    INPUT_BLOCKS: tl.constexpr = (INPUTS + BLOCK_INPUTS - 1) // BLOCK_INPUTS
    program = tl.program_id(0).to(tl.int64)
    n, p = image_and_pixel(program // INPUT_BLOCKS, PIXELS, BLOCK_ROWS)
    i = channel_range(program % INPUT_BLOCKS * BLOCK_INPUTS, BLOCK_INPUTS)
    inside = (n < images)[:, None]
    grad_rows = n[:, None] * grad_image_stride + p[:, None] * grad_pixel_stride
    slope_rows = n[:, None] * slope_image_stride + p[:, None] * slope_pixel_stride

    values = widen(tl.zeros((BLOCK_ROWS, BLOCK_INPUTS), weight.dtype.element_ty))
    for first in range(0, OUTPUTS, BLOCK_OUTPUTS):
        o = channel_range(first, BLOCK_OUTPUTS)
        mask = inside & (o < OUTPUTS)[None, :]
        grad = tl.load(grad_y + (grad_rows + o[None, :] * grad_channel_stride), mask=mask, other=0.0)
        slope_tile = tl.load(slope + (slope_rows + o[None, :] * slope_channel_stride), mask=mask, other=0.0)
        grad_z = widen(grad) * widen(slope_tile)
        w_mask = (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :]
        w_tile = tl.load(weight + (o[:, None] * INPUTS + i[None, :]), mask=w_mask, other=0.0)  # [O, I]
        values += product(grad_z.to(w_tile.dtype), w_tile, PRECISION)

    offset = n[:, None] * x_image_stride + p[:, None] * x_pixel_stride + i[None, :] * x_channel_stride
    tl.store(grad_x + offset, values.to(grad_x.dtype.element_ty), mask=inside & (i < INPUTS)[None, :])


@triton.jit
def pointwise_gelu_backward_weight(
    grad_y,  # (N, O, P), of any strides
    slope,  # (N, O, P), of any strides
    x,  # (N, I, P), of any strides
    partials,  # [parts, O * I + O]: gradients of weight and bias
    images,
    rounds,
    grad_image_stride,
    grad_channel_stride,
    grad_pixel_stride,
    slope_image_stride,
    slope_channel_stride,
    slope_pixel_stride,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    PIXELS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """One tile of the weight's gradient, grad_z x^T, and some of the bias's, over `rounds` blocks of rows."""
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
        offset = (n * slope_image_stride + p * slope_pixel_stride)[None, :] + o[:, None] * slope_channel_stride
        slope_tile = tl.load(slope + offset, mask=mask, other=0.0)
        grad_z = widen(grad) * widen(slope_tile)
        offset = (n * x_image_stride + p * x_pixel_stride)[:, None] + i[None, :] * x_channel_stride
        x_mask = (n < images)[:, None] & (i < INPUTS)[None, :]
        x_tile = tl.load(x + offset, mask=x_mask, other=0.0)  # [rows, I]
        values += product(grad_z.to(x_tile.dtype), x_tile, PRECISION)
        bias += tl.sum(grad_z, 1)

    target = partials + part * (OUTPUTS * INPUTS + OUTPUTS)
    w_mask = (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :]
    tl.store(target + (o[:, None] * INPUTS + i[None, :]), values, mask=w_mask)
    # One program stores it: those of other inputs have the same sum.
    if tile % INPUT_BLOCKS == 0:
        tl.store(target + OUTPUTS * INPUTS + o, bias, mask=o < OUTPUTS)
