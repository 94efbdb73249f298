"""Layer norm over the channels of each pixel, forward and backward.

Rows are the pixels of all images, n * P + p.
"""

import triton
import triton.language as tl

from ..common.product import widen


@triton.jit
def rows_of_block(block, pixels, BLOCK_ROWS: tl.constexpr):
    """Image and pixel of each row of a block: int64, [BLOCK_ROWS, 1]."""
    row = (block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    return row // pixels, row % pixels


@triton.jit(do_not_specialize=["images"])
def channel_norm(
    x,  # (N, C, P), of any strides
    weight,  # [C]
    bias,  # [C]
    y,  # (N, C, P), of any strides
    mean,  # [N * P]
    scale,  # [N * P]: 1 / sqrt(variance + eps)
    images,
    pixels,
    eps,
    x_image_stride,  # in units of STRIDE_UNIT
    x_channel_stride,
    x_pixel_stride,  # in units of STRIDE_UNIT
    y_image_stride,  # in units of STRIDE_UNIT
    y_channel_stride,
    y_pixel_stride,  # in units of STRIDE_UNIT
    STRIDE_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,  # at least C
):
    n, p = rows_of_block(tl.program_id(0), pixels, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_CHANNELS)[None, :].to(tl.int64)
    inside = (n < images) & (c < CHANNELS)
    offset = (n * x_image_stride + p * x_pixel_stride) * STRIDE_UNIT + c * x_channel_stride
    values = widen(tl.load(x + offset, mask=inside, other=0.0))
    means = tl.sum(values, 1, keep_dims=True) / CHANNELS
    # The rounding of a large mean shows in the sum of the deviations, and is taken back.
    means += tl.sum(tl.where(inside, values - means, 0.0), 1, keep_dims=True) / CHANNELS
    values = tl.where(inside, values - means, 0.0)
    scales = 1.0 / tl.sqrt(tl.sum(values * values, 1, keep_dims=True) / CHANNELS + eps)
    tl.store(mean + (n * pixels + p), means, mask=n < images)
    tl.store(scale + (n * pixels + p), scales, mask=n < images)
    values *= scales
    if HAS_WEIGHT:
        values *= widen(tl.load(weight + c, mask=c < CHANNELS, other=0.0))
    if HAS_BIAS:
        values += widen(tl.load(bias + c, mask=c < CHANNELS, other=0.0))
    offset = (n * y_image_stride + p * y_pixel_stride) * STRIDE_UNIT + c * y_channel_stride
    tl.store(y + offset, values.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["images", "rounds"])
def channel_norm_backward(
    grad,  # (N, C, P), of any strides
    x,  # (N, C, P), of any strides: what was normalised or, without a mean, the normalised tensor itself
    mean,  # [N * P]
    scale,  # [N * P]
    weight,  # [C]
    grad_x,  # (N, C, P), of any strides
    partials,  # [parts, 2, C]: gradients of weight and bias
    images,
    pixels,
    rounds,
    grad_image_stride,  # in units of STRIDE_UNIT
    grad_channel_stride,
    grad_pixel_stride,  # in units of STRIDE_UNIT
    x_image_stride,  # in units of STRIDE_UNIT
    x_channel_stride,
    x_pixel_stride,  # in units of STRIDE_UNIT
    grad_x_image_stride,  # in units of STRIDE_UNIT
    grad_x_channel_stride,
    grad_x_pixel_stride,  # in units of STRIDE_UNIT
    STRIDE_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_PARAMETERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,  # at least C
):
    """grad_x = scale (g - mean(g) - x^ mean(g x^)), with g = grad * weight and x^ the normalised tensor."""
    part = tl.program_id(0)
    c = tl.arange(0, BLOCK_CHANNELS)[None, :].to(tl.int64)
    if HAS_WEIGHT:
        factors = widen(tl.load(weight + c, mask=c < CHANNELS, other=0.0))
    if NEEDS_PARAMETERS:
        weight_sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), partials.dtype.element_ty)
        bias_sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), partials.dtype.element_ty)
    for round in range(rounds):
        n, p = rows_of_block(part * rounds + round, pixels, BLOCK_ROWS)
        inside = (n < images) & (c < CHANNELS)
        row = n * pixels + p
        offset = (n * x_image_stride + p * x_pixel_stride) * STRIDE_UNIT + c * x_channel_stride
        normalised = widen(tl.load(x + offset, mask=inside, other=0.0))
        scales = tl.load(scale + row, mask=n < images, other=0.0)
        if HAS_MEAN:
            means = tl.load(mean + row, mask=n < images, other=0.0)
            normalised = tl.where(inside, (normalised - means) * scales, 0.0)
        offset = (n * grad_image_stride + p * grad_pixel_stride) * STRIDE_UNIT + c * grad_channel_stride
        values = widen(tl.load(grad + offset, mask=inside, other=0.0))
        if NEEDS_PARAMETERS:
            weight_sums += values * normalised
            bias_sums += values
        if HAS_WEIGHT:
            values *= factors
        average = tl.sum(values, 1, keep_dims=True) / CHANNELS
        slope = tl.sum(values * normalised, 1, keep_dims=True) / CHANNELS
        values = scales * (values - average - normalised * slope)
        if CHANNELS == 1:
            # The norm of one value is constant, but a product fused with a subtraction leaves a remainder.
            values *= 0.0
        offset = (n * grad_x_image_stride + p * grad_x_pixel_stride) * STRIDE_UNIT + c * grad_x_channel_stride
        tl.store(grad_x + offset, values.to(grad_x.dtype.element_ty), mask=inside)
    if NEEDS_PARAMETERS:
        target = partials + part.to(tl.int64) * 2 * CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        real = tl.arange(0, BLOCK_CHANNELS) < CHANNELS
        tl.store(target, tl.sum(weight_sums, 0), mask=real)
        tl.store(target + CHANNELS, tl.sum(bias_sums, 0), mask=real)
