"""The depthwise convolution as a sum over its taps, for maps of any size: alone, or with the norm of each pixel.

A program makes BLOCK_WIDTH pixels of one row. Channels lie side by side in memory and in the lanes of a program,
and the sums of the pixels are a tuple of tensors [BLOCK_CHANNELS]: each input that is loaded stays in registers
until it has been added to all the sums of the row that it belongs to. For kernels of 7 x 7 that is one load for
four to five multiplications, where a tile of pixels in one tensor takes one for each.

Output channel k reads input channel k // M. The gradient of x is the same sum with the taps the other way round,
over the M outputs of each channel.
"""

import triton
import triton.language as tl

from .product import widen


@triton.jit
def added(sums, index: tl.constexpr, term):
    """The tuple `sums` with `term` added to one element."""
    return sums[:index] + (sums[index] + term,) + sums[index + 1 :]


@triton.jit
def channels_if(condition, k, CHANNELS: tl.constexpr):
    """Which of the channels `k` exist, if `condition`, else none: a mask for one pixel."""
    return k < tl.where(condition, CHANNELS, 0)


@triton.jit
def strip_of_program(height, width, CHANNEL_BLOCKS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """(image, row, first column, channel block) of a program, the channel block varying fastest."""
    strips = (width + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    program = tl.program_id(0)
    strip = program // CHANNEL_BLOCKS
    line = strip // strips
    image = (line // height).to(tl.int64)
    return image, line % height, strip % strips * BLOCK_WIDTH, program % CHANNEL_BLOCKS


@triton.jit
def convolve_strip(
    x,  # (N, C, H, W), channels side by side
    taps,  # [kh * kw, outputs of the convolution]
    image,
    row,
    first_column,
    k,  # [BLOCK_CHANNELS]: channels of the result
    height,
    width,
    x_image_stride,
    x_row_stride,
    x_column_stride,
    OUTPUTS: tl.constexpr,  # of the convolution
    MULTIPLIER: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the gradient of x: x is the gradient of the outputs, the result that of the inputs
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The sums of BLOCK_WIDTH pixels, from `first_column` on: a tuple of tensors [BLOCK_CHANNELS]."""
    TERMS: tl.constexpr = MULTIPLIER if TRANSPOSED else 1
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    zero = widen(tl.zeros((BLOCK_CHANNELS,), x.dtype.element_ty))
    sums = (zero,) * BLOCK_WIDTH
    for term in tl.static_range(TERMS):
        if TRANSPOSED:
            x_channel = k * MULTIPLIER + term
            output = x_channel
        else:
            x_channel = k // MULTIPLIER
            output = k
        for tap_row in range(KERNEL_HEIGHT):
            x_row = row + tap_row - KERNEL_HEIGHT // 2
            on_map = (x_row >= 0) & (x_row < height)
            source = x + (image * x_image_stride + x_row * x_row_stride) + x_channel
            tap_values = ()
            for tap_column in tl.static_range(KERNEL_WIDTH):
                tap = tap_row * KERNEL_WIDTH + tap_column
                if TRANSPOSED:
                    tap = TAPS - 1 - tap
                loaded = tl.load(taps + tap * OUTPUTS + output, mask=output < OUTPUTS, other=0.0)
                tap_values = tap_values + (widen(loaded),)
            for step in tl.static_range(BLOCK_WIDTH + KERNEL_WIDTH - 1):
                column = first_column + step - KERNEL_WIDTH // 2
                inside = channels_if(on_map & (column >= 0) & (column < width), output, OUTPUTS)
                value = widen(tl.load(source + column * x_column_stride, mask=inside, other=0.0))
                for pixel in tl.static_range(BLOCK_WIDTH):
                    if step - pixel >= 0 and step - pixel < KERNEL_WIDTH:
                        sums = added(sums, pixel, value * tap_values[step - pixel])
    return sums


@triton.jit
def stencil(
    x,  # (N, C, H, W), channels side by side
    taps,  # [kh * kw, outputs of the convolution]
    bias,  # [K]
    y,  # (N, K, H, W), channels_last
    height,
    width,
    x_image_stride,
    x_row_stride,
    x_column_stride,
    CHANNELS: tl.constexpr,  # K, of y
    OUTPUTS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The depthwise convolution, or the gradient of its input."""
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    image, row, first_column, block = strip_of_program(height, width, CHANNEL_BLOCKS, BLOCK_WIDTH)
    k = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    sums = convolve_strip(
        x,
        taps,
        image,
        row,
        first_column,
        k,
        height,
        width,
        x_image_stride,
        x_row_stride,
        x_column_stride,
        OUTPUTS,
        MULTIPLIER,
        TRANSPOSED,
        KERNEL_HEIGHT,
        KERNEL_WIDTH,
        BLOCK_CHANNELS,
        BLOCK_WIDTH,
    )
    shift = widen(tl.zeros((BLOCK_CHANNELS,), x.dtype.element_ty))
    if HAS_BIAS:
        shift = widen(tl.load(bias + k, mask=k < CHANNELS, other=0.0))
    target = y + (image * height + row) * width * CHANNELS + k
    for pixel in tl.static_range(BLOCK_WIDTH):
        column = first_column + pixel
        inside = channels_if(column < width, k, CHANNELS)
        tl.store(target + column * CHANNELS, (sums[pixel] + shift).to(y.dtype.element_ty), mask=inside)


@triton.jit
def stencil_channel_norm(
    x,  # (N, C, H, W), channels side by side
    taps,  # [kh * kw, K]
    bias,  # [K]
    norm_weight,  # [K]
    norm_bias,  # [K]
    y,  # (N, K, H, W), channels_last
    normalised,  # as y: the norm without its weight and bias
    scale,  # [N * H * W]: 1 / sqrt(variance + eps)
    height,
    width,
    eps,
    x_image_stride,
    x_row_stride,
    x_column_stride,
    CHANNELS: tl.constexpr,  # K
    MULTIPLIER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    KEEP_NORMALISED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,  # at least K
    BLOCK_WIDTH: tl.constexpr,
):
    """The depthwise convolution, then the layer norm of the channels of each pixel."""
    image, row, first_column, _ = strip_of_program(height, width, 1, BLOCK_WIDTH)
    k = tl.arange(0, BLOCK_CHANNELS)
    sums = convolve_strip(
        x,
        taps,
        image,
        row,
        first_column,
        k,
        height,
        width,
        x_image_stride,
        x_row_stride,
        x_column_stride,
        CHANNELS,
        MULTIPLIER,
        False,
        KERNEL_HEIGHT,
        KERNEL_WIDTH,
        BLOCK_CHANNELS,
        BLOCK_WIDTH,
    )
    real = k < CHANNELS
    shift = widen(tl.zeros((BLOCK_CHANNELS,), x.dtype.element_ty))
    if HAS_BIAS:
        shift = widen(tl.load(bias + k, mask=real, other=0.0))
    if HAS_NORM_WEIGHT:
        weight = widen(tl.load(norm_weight + k, mask=real, other=0.0))
    if HAS_NORM_BIAS:
        offset = widen(tl.load(norm_bias + k, mask=real, other=0.0))
    line = (image * height + row) * width
    for pixel in tl.static_range(BLOCK_WIDTH):
        column = first_column + pixel
        inside = channels_if(column < width, k, CHANNELS)
        value = sums[pixel] + shift
        mean = tl.sum(value, 0) / CHANNELS
        centred = tl.where(real, value - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / CHANNELS + eps)
        value = centred * inverse
        target = (line + column) * CHANNELS + k
        if KEEP_SCALE:
            tl.store(scale + (line + column), inverse, mask=column < width)
        if KEEP_NORMALISED:
            tl.store(normalised + target, value.to(normalised.dtype.element_ty), mask=inside)
        if HAS_NORM_WEIGHT:
            value *= weight
        if HAS_NORM_BIAS:
            value += offset
        tl.store(y + target, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def stencil_backward_taps(
    grad,  # (N, K, H, W), channels_last
    x,  # (N, C, H, W), channels side by side
    partials,  # [parts, kh * kw + 1, K]: gradients of taps and bias
    lines,  # N * H
    rounds,
    height,
    width,
    x_image_stride,
    x_row_stride,
    x_column_stride,
    CHANNELS: tl.constexpr,  # K
    MULTIPLIER: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_TAP_ROWS: tl.constexpr,
):
    """The gradients of some rows of taps, from `rounds` rows of maps."""
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    TAP_BLOCKS: tl.constexpr = (KERNEL_HEIGHT + BLOCK_TAP_ROWS - 1) // BLOCK_TAP_ROWS
    program = tl.program_id(0)
    part = program // (CHANNEL_BLOCKS * TAP_BLOCKS)
    first_tap_row = program // CHANNEL_BLOCKS % TAP_BLOCKS * BLOCK_TAP_ROWS
    k = program % CHANNEL_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    zero = widen(tl.zeros((BLOCK_CHANNELS,), grad.dtype.element_ty))
    sums = (zero,) * (BLOCK_TAP_ROWS * KERNEL_WIDTH)
    bias = zero
    for round in range(rounds):
        line = part * rounds + round
        row = line % height
        image = (line // height).to(tl.int64)
        for first_column in range(0, width, BLOCK_WIDTH):
            grads = ()
            for pixel in tl.static_range(BLOCK_WIDTH):
                column = first_column + pixel
                offset = (line.to(tl.int64) * width + column) * CHANNELS + k
                inside = channels_if((line < lines) & (column < width), k, CHANNELS)
                value = widen(tl.load(grad + offset, mask=inside, other=0.0))
                grads = grads + (value,)
                bias += value
            for tap_row in tl.static_range(BLOCK_TAP_ROWS):
                x_row = row + first_tap_row + tap_row - KERNEL_HEIGHT // 2
                on_map = (line < lines) & (x_row >= 0) & (x_row < height)
                source = x + (image * x_image_stride + x_row * x_row_stride) + k // MULTIPLIER
                for step in tl.static_range(BLOCK_WIDTH + KERNEL_WIDTH - 1):
                    column = first_column + step - KERNEL_WIDTH // 2
                    inside = channels_if(on_map & (column >= 0) & (column < width), k, CHANNELS)
                    value = widen(tl.load(source + column * x_column_stride, mask=inside, other=0.0))
                    for pixel in tl.static_range(BLOCK_WIDTH):
                        if step - pixel >= 0 and step - pixel < KERNEL_WIDTH:
                            sums = added(sums, tap_row * KERNEL_WIDTH + step - pixel, value * grads[pixel])
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    target = partials + part.to(tl.int64) * (TAPS + 1) * CHANNELS + k
    for tap in tl.static_range(BLOCK_TAP_ROWS * KERNEL_WIDTH):
        number = first_tap_row * KERNEL_WIDTH + tap
        tl.store(target + number * CHANNELS, sums[tap], mask=channels_if(number < TAPS, k, CHANNELS))
    # The programs of other rows of taps have summed the same.
    if first_tap_row == 0:
        tl.store(target + TAPS * CHANNELS, bias, mask=k < CHANNELS)
