"""The rest of a ConvNextBlock after its depthwise convolution, as one kernel forward and one backward.

Rows are pixels of images: one program takes BLOCK_IMAGES x BLOCK_PIXELS of them, and all channels. The norm is
applied to tiles of h as they are read, and the normalised tensor is never written.

P is the number of pixels, K the channels of h, O the channels after the pointwise convolution, C those of x.
"""

import triton
import triton.language as tl

from ..common.activation import gelu, gelu_derivative
from ..common.product import product, widen
from ..common.reduction import accumulate
from ..common.statistics import mean_and_scale, part_of_group, store_sums


@triton.jit
def spread(values, BLOCK_IMAGES: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """One value, or one for each image, [BLOCK_IMAGES, 1], to each row: [BLOCK_IMAGES * BLOCK_PIXELS, 1]."""
    rows = tl.broadcast_to(values, (BLOCK_IMAGES, BLOCK_PIXELS))
    return tl.reshape(rows, (BLOCK_IMAGES * BLOCK_PIXELS, 1))


@triton.jit
def norm_mlp_residual(
    h,  # [N, K, P]
    moments,  # [groups, 3, parts]
    x,  # (N, C, P), of any strides
    weight,  # [O, K]
    bias,  # [O]
    projection,  # [C, O]
    projection_bias,  # [C]
    z,  # [N, O, P]: what goes into GELU
    y,  # (N, C, P), of any strides
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
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PROJECTION_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,  # a power of two, at least HIDDEN
    BLOCK_CHANNELS: tl.constexpr,  # a power of two, at least CHANNELS
):
    """y = x + projection gelu(weight normalised + bias) + projection_bias."""
    PIXEL_BLOCKS: tl.constexpr = (PIXELS + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    program = tl.program_id(0).to(tl.int64)
    image = program // PIXEL_BLOCKS * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)[:, None]
    row = tl.arange(0, BLOCK_IMAGES * BLOCK_PIXELS)
    n = program // PIXEL_BLOCKS * BLOCK_IMAGES + row // BLOCK_PIXELS
    p = program % PIXEL_BLOCKS * BLOCK_PIXELS + row % BLOCK_PIXELS
    inside = ((n < images) & (p < PIXELS))[:, None]
    o = tl.arange(0, BLOCK_HIDDEN)
    c = tl.arange(0, BLOCK_CHANNELS)

    mean, scale = mean_and_scale(moments, image, images, parts, eps, NORM, BLOCK_PARTS)
    mean = spread(mean, BLOCK_IMAGES, BLOCK_PIXELS)
    scale = spread(scale, BLOCK_IMAGES, BLOCK_PIXELS)
    values = widen(tl.zeros((BLOCK_IMAGES * BLOCK_PIXELS, BLOCK_HIDDEN), weight.dtype.element_ty))
    for first in range(0, INPUTS, BLOCK_INPUTS):
        k = first + tl.arange(0, BLOCK_INPUTS)
        k_inside = inside & (k < INPUTS)[None, :]
        h_tile = tl.load(h + (n[:, None] * INPUTS + k[None, :]) * PIXELS + p[:, None], mask=k_inside, other=0.0)
        normalised = tl.where(k_inside, (widen(h_tile) - mean) * scale, 0.0)
        w_mask = (k < INPUTS)[:, None] & (o < HIDDEN)[None, :]
        w_tile = tl.load(weight + o[None, :] * INPUTS + k[:, None], mask=w_mask, other=0.0)  # [K, O]
        values += product(normalised.to(w_tile.dtype), w_tile, PRECISION)
    if HAS_BIAS:
        values += widen(tl.load(bias + o, mask=o < HIDDEN, other=0.0))[None, :]
    z_mask = inside & (o < HIDDEN)[None, :]
    tl.store(
        z + (n[:, None] * HIDDEN + o[None, :]) * PIXELS + p[:, None], values.to(z.dtype.element_ty), mask=z_mask
    )

    activation = gelu(values, APPROXIMATE)
    v_mask = (o < HIDDEN)[:, None] & (c < CHANNELS)[None, :]
    v_tile = tl.load(projection + c[None, :] * HIDDEN + o[:, None], mask=v_mask, other=0.0)  # [O, C]
    result = product(activation.to(v_tile.dtype), v_tile, PRECISION)
    if HAS_PROJECTION_BIAS:
        result += widen(tl.load(projection_bias + c, mask=c < CHANNELS, other=0.0))[None, :]
    y_mask = inside & (c < CHANNELS)[None, :]
    # int64: a channel times its stride may exceed 2^31.
    channel = c[None, :].to(tl.int64)
    x_offset = n[:, None] * x_image_stride + channel * x_channel_stride + p[:, None] * x_pixel_stride
    # The residual is added to what would have been stored, as in PyTorch.
    result = result.to(projection.dtype.element_ty)
    result = widen(tl.load(x + x_offset, mask=y_mask, other=0.0)) + widen(result)
    y_offset = n[:, None] * y_image_stride + channel * y_channel_stride + p[:, None] * y_pixel_stride
    tl.store(y + y_offset, result.to(y.dtype.element_ty), mask=y_mask)


@triton.jit
def norm_mlp_residual_backward(
    grad_y,  # (N, C, P), of any strides
    h,  # [N, K, P]
    moments,  # [groups, 3, parts]
    z,  # [N, O, P]
    weight,  # [O, K]
    projection,  # [C, O]
    g,  # [N, K, P]: the gradient of the normalised tensor
    sums,  # [groups, 2, sum_parts]: sums of g, and of g * normalised
    partials,  # [programs, O * K + C * O + O + C]: gradients of weight, projection, and their biases
    images,
    blocks,
    rounds,
    parts,
    sum_parts,
    eps,
    grad_image_stride,
    grad_channel_stride,
    grad_pixel_stride,
    PIXELS: tl.constexpr,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    NORM: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The gradient of the normalised tensor; and those of weights and biases, summed over a program's rounds."""
    PIXEL_BLOCKS: tl.constexpr = (PIXELS + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_IMAGES * BLOCK_PIXELS)
    o = tl.arange(0, BLOCK_HIDDEN)
    c = tl.arange(0, BLOCK_CHANNELS)
    weight_grad = partials + program * (HIDDEN * INPUTS + CHANNELS * HIDDEN + HIDDEN + CHANNELS)
    projection_grad = weight_grad + HIDDEN * INPUTS
    bias_grad = projection_grad + CHANNELS * HIDDEN
    projection_bias_grad = bias_grad + HIDDEN
    v_mask = (c < CHANNELS)[:, None] & (o < HIDDEN)[None, :]
    v_offset = c[:, None] * HIDDEN + o[None, :]

    for round in range(rounds):
        block = program * rounds + round
        image = block // PIXEL_BLOCKS * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)[:, None]
        n = block // PIXEL_BLOCKS * BLOCK_IMAGES + row // BLOCK_PIXELS
        p = block % PIXEL_BLOCKS * BLOCK_PIXELS + row % BLOCK_PIXELS
        inside = ((n < images) & (p < PIXELS))[:, None]
        # int64: a channel times its stride may exceed 2^31.
        grad_offset = n[:, None] * grad_image_stride + c[None, :].to(tl.int64) * grad_channel_stride
        grad_offset += p[:, None] * grad_pixel_stride
        grad = tl.load(grad_y + grad_offset, mask=inside & (c < CHANNELS)[None, :], other=0.0)  # [rows, C]
        grad = grad.to(weight.dtype.element_ty)
        accumulate(projection_bias_grad + c, tl.sum(widen(grad), 0), c < CHANNELS, round == 0)
        z_mask = inside & (o < HIDDEN)[None, :]
        z_tile = widen(
            tl.load(z + (n[:, None] * HIDDEN + o[None, :]) * PIXELS + p[:, None], mask=z_mask, other=0.0)
        )
        activation = gelu(z_tile, APPROXIMATE).to(grad.dtype)
        accumulate(projection_grad + v_offset, product(tl.trans(grad), activation, PRECISION), v_mask, round == 0)
        v_tile = tl.load(projection + v_offset, mask=v_mask, other=0.0)  # [C, O]
        grad_z = product(grad, v_tile, PRECISION) * gelu_derivative(z_tile, APPROXIMATE)
        accumulate(bias_grad + o, tl.sum(grad_z, 0), o < HIDDEN, round == 0)
        grad_z = grad_z.to(grad.dtype)

        mean, scale = mean_and_scale(moments, image, images, parts, eps, NORM, BLOCK_PARTS)
        mean = spread(mean, BLOCK_IMAGES, BLOCK_PIXELS)
        scale = spread(scale, BLOCK_IMAGES, BLOCK_PIXELS)
        g_sum = widen(tl.zeros((BLOCK_IMAGES * BLOCK_PIXELS, BLOCK_INPUTS), weight.dtype.element_ty))
        slope_sum = tl.zeros_like(g_sum)
        # Not unrolled: the compiler would read ahead more than registers hold.
        for first in range(0, INPUTS, BLOCK_INPUTS):
            k = first + tl.arange(0, BLOCK_INPUTS)
            k_inside = inside & (k < INPUTS)[None, :]
            offset = (n[:, None] * INPUTS + k[None, :]) * PIXELS + p[:, None]
            normalised = (widen(tl.load(h + offset, mask=k_inside, other=0.0)) - mean) * scale
            normalised = tl.where(k_inside, normalised, 0.0)
            w_mask = (o < HIDDEN)[:, None] & (k < INPUTS)[None, :]
            w_offset = o[:, None] * INPUTS + k[None, :]
            w_tile = tl.load(weight + w_offset, mask=w_mask, other=0.0)  # [O, K]
            g_tile = product(grad_z, w_tile, PRECISION)
            tl.store(g + offset, g_tile.to(g.dtype.element_ty), mask=k_inside)
            matrix = product(tl.trans(grad_z), normalised.to(grad.dtype), PRECISION)
            accumulate(weight_grad + w_offset, matrix, w_mask, round == 0)
            g_sum += g_tile
            slope_sum += g_tile * normalised
        part = part_of_group(block, block % PIXEL_BLOCKS, NORM)
        # Rows outside hold zeros.
        g_sum = tl.reshape(g_sum, (BLOCK_IMAGES, BLOCK_PIXELS * BLOCK_INPUTS))
        slope_sum = tl.reshape(slope_sum, (BLOCK_IMAGES, BLOCK_PIXELS * BLOCK_INPUTS))
        if block < blocks:
            store_sums(g_sum, slope_sum, sums, image, images, part, sum_parts, NORM)
