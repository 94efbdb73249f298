"""The depthwise convolution as matrix products, with the statistics of the norm that follows; and its gradients.

For each input channel, the pixels of an output map are a banded Toeplitz matrix of the taps times the pixels of
the input map: with the images of the batch as rows these are products of tensor-core shape. The matrix is gathered
from the taps inside the kernel. A NaN or an infinity in one pixel spreads over its whole map (0 x Inf); a sliding
window would keep it near, but the norm spreads it further anyway.

P is the number of pixels, K = C * M the number of output channels.
"""

import triton
import triton.language as tl

from ..common.product import product, widen
from ..common.reduction import accumulate
from ..common.statistics import (
    mean_and_scale,
    merge_sums,
    part_of_group,
    start_of_group,
    store_moments,
    values_in_group,
)


@triton.jit
def load_toeplitz(
    taps,  # [KERNEL_HEIGHT * KERNEL_WIDTH], of one output channel
    q,  # [BLOCK], pixels of the input
    p,  # [BLOCK], pixels of the output
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
):
    """[q, p]: the tap through which output pixel p sees input pixel q, or 0."""
    row = (q // WIDTH)[:, None] - (p // WIDTH)[None, :] + KERNEL_HEIGHT // 2
    column = (q % WIDTH)[:, None] - (p % WIDTH)[None, :] + KERNEL_WIDTH // 2
    inside = (row >= 0) & (row < KERNEL_HEIGHT) & (column >= 0) & (column < KERNEL_WIDTH)
    inside &= (q < HEIGHT * WIDTH)[:, None] & (p < HEIGHT * WIDTH)[None, :]
    return tl.load(taps + row * KERNEL_WIDTH + column, mask=inside, other=0.0)


@triton.jit
def depthwise_forward(
    x,  # (N, C, P), of any strides
    weight,  # [K, KERNEL_HEIGHT * KERNEL_WIDTH]
    bias,  # [K]
    h,  # [N, K, P]
    moments,  # [groups, 3, parts]
    images,
    parts,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    OUTPUTS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """One program: BLOCK_IMAGES images, one output channel, BLOCK_PIXELS output pixels; BLOCK_INPUTS at a time."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    PIXEL_BLOCKS: tl.constexpr = (PIXELS + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    program = tl.program_id(0).to(tl.int64)
    k = program % OUTPUTS
    pixel_block = program // OUTPUTS % PIXEL_BLOCKS
    image_block = program // OUTPUTS // PIXEL_BLOCKS
    n = image_block * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)
    p = pixel_block.to(tl.int32) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    x_rows = x + n[:, None] * x_image_stride + k // MULTIPLIER * x_channel_stride
    taps = weight + k * (KERNEL_HEIGHT * KERNEL_WIDTH)

    values = widen(tl.zeros((BLOCK_IMAGES, BLOCK_PIXELS), weight.dtype.element_ty))
    for first in range(0, PIXELS, BLOCK_INPUTS):
        q = first + tl.arange(0, BLOCK_INPUTS)
        inside = (n < images)[:, None] & (q < PIXELS)[None, :]
        # int64: a pixel times its stride may exceed 2^31.
        x_tile = tl.load(x_rows + q[None, :].to(tl.int64) * x_pixel_stride, mask=inside, other=0.0)
        matrix = load_toeplitz(taps, q, p, HEIGHT, WIDTH, KERNEL_HEIGHT, KERNEL_WIDTH)
        values += product(x_tile.to(matrix.dtype), matrix, PRECISION)
    if HAS_BIAS:
        values += widen(tl.load(bias + k))

    inside = (n < images)[:, None] & (p < PIXELS)[None, :]
    h_tile = values.to(h.dtype.element_ty)
    tl.store(h + (n[:, None] * OUTPUTS + k) * PIXELS + p[None, :], h_tile, mask=inside)
    part = part_of_group(program, k * PIXEL_BLOCKS + pixel_block, NORM)
    # The moments of what the norm is given: beside a large bias, rounding changes mean and variance.
    store_moments(widen(h_tile), inside, moments, n[:, None], images, part, parts, NORM)


@triton.jit
def depthwise_backward(
    g,  # (N, K, P), of any strides: the gradient of the normalised tensor
    h,  # [N, K, P]
    x,  # (N, C, P), of any strides
    residual,  # (N, C, P), of any strides: added to grad_x
    weight,  # [K, KERNEL_HEIGHT * KERNEL_WIDTH]
    moments,  # [groups, 3, parts]
    sums,  # [groups, 2, sum_parts]: sums of g, and of g * normalised
    grad_x,  # (N, C, P), of any strides
    grad_matrix,  # [image programs, K, P, P]
    grad_bias,  # [image programs, K]
    images,
    rounds,
    parts,
    sum_parts,
    eps,
    g_image_stride,
    g_channel_stride,
    g_pixel_stride,
    x_image_stride,
    x_channel_stride,
    x_pixel_stride,
    residual_image_stride,
    residual_channel_stride,
    residual_pixel_stride,
    grad_x_image_stride,
    grad_x_channel_stride,
    grad_x_pixel_stride,
    CHANNELS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """One program: one input channel, BLOCK_PIXELS input pixels, and in each round BLOCK_IMAGES images.

    grad_h = r (g - mean(g) - normalised * mean(g * normalised)), with r = 1 / sqrt(variance + eps); from it the
    gradients of x, of the Toeplitz matrix, and of the bias.
    """
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    PIXEL_BLOCKS: tl.constexpr = (PIXELS + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    # Tensor cores cut what they add: sums over images would be three times as far off as PyTorch's.
    TAPS_PRECISION: tl.constexpr = "ieee" if PRECISION == "tf32x3" else PRECISION
    program = tl.program_id(0).to(tl.int64)
    c = program % CHANNELS
    pixel_block = program // CHANNELS % PIXEL_BLOCKS
    image_program = program // CHANNELS // PIXEL_BLOCKS
    OUTPUTS: tl.constexpr = CHANNELS * MULTIPLIER
    q = pixel_block.to(tl.int32) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    # int64: a pixel times its stride may exceed 2^31.
    pixel = q[None, :].to(tl.int64)
    count = values_in_group(OUTPUTS * PIXELS, images, NORM)

    for round in range(rounds):
        n = (image_program * rounds + round) * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)
        x_inside = (n < images)[:, None] & (q < PIXELS)[None, :]
        mean, scale = mean_and_scale(moments, n[:, None], images, parts, eps, NORM, BLOCK_PARTS)
        start = start_of_group(sums, n[:, None], images, 2 * sum_parts, NORM)
        g_sum, slope_sum = merge_sums(start, sum_parts, BLOCK_PARTS)
        g_mean, g_slope = g_sum / count, slope_sum / count
        x_offset = n[:, None] * x_image_stride + c * x_channel_stride + pixel * x_pixel_stride

        values = widen(tl.zeros((BLOCK_IMAGES, BLOCK_PIXELS), weight.dtype.element_ty))
        # Not unrolled: the compiler would read ahead more than registers hold.
        for m in range(MULTIPLIER):
            k = c * MULTIPLIER + m
            taps = weight + k * (KERNEL_HEIGHT * KERNEL_WIDTH)
            bias_sum = tl.zeros((BLOCK_IMAGES,), values.dtype)
            for first in range(0, PIXELS, BLOCK_PIXELS):
                p = first + tl.arange(0, BLOCK_PIXELS)
                inside = (n < images)[:, None] & (p < PIXELS)[None, :]
                g_offset = n[:, None] * g_image_stride + k * g_channel_stride
                g_offset += p[None, :].to(tl.int64) * g_pixel_stride
                g_tile = widen(tl.load(g + g_offset, mask=inside, other=0.0))
                h_offset = (n[:, None] * OUTPUTS + k) * PIXELS + p[None, :]
                h_tile = widen(tl.load(h + h_offset, mask=inside, other=0.0))
                normalised = (h_tile - mean) * scale
                grad_h = scale * (g_tile - g_mean - normalised * g_slope)
                grad_h = tl.where(inside, grad_h, 0.0)
                bias_sum += tl.sum(grad_h, 1)

                grad_h = grad_h.to(weight.dtype.element_ty)
                matrix = load_toeplitz(taps, q, p, HEIGHT, WIDTH, KERNEL_HEIGHT, KERNEL_WIDTH)
                values += product(grad_h, tl.trans(matrix), PRECISION)
                # x is loaded for each output: registers are dearer than a load from the L1 cache.
                x_tile = tl.load(x + x_offset, mask=x_inside, other=0.0).to(grad_h.dtype)
                matrix_grad = product(tl.trans(x_tile), grad_h, TAPS_PRECISION)
                target = grad_matrix + ((image_program * OUTPUTS + k) * PIXELS + q[:, None]) * PIXELS + p[None, :]
                accumulate(target, matrix_grad, (q < PIXELS)[:, None] & (p < PIXELS)[None, :], round == 0)
            accumulate(grad_bias + image_program * OUTPUTS + k, tl.sum(bias_sum), pixel_block == 0, round == 0)

        if HAS_RESIDUAL:
            offset = n[:, None] * residual_image_stride + c * residual_channel_stride
            offset += pixel * residual_pixel_stride
            values += widen(tl.load(residual + offset, mask=x_inside, other=0.0))
        offset = n[:, None] * grad_x_image_stride + c * grad_x_channel_stride + pixel * grad_x_pixel_stride
        tl.store(grad_x + offset, values.to(grad_x.dtype.element_ty), mask=x_inside)
