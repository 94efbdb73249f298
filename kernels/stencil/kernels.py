"""The depthwise convolution as a sum over its taps, for maps of any size: alone, or with the norm of each pixel.

A program makes a strip of BLOCK_WIDTH pixels of each of BLOCK_LINES rows. Channels lie side by side in memory and
in the lanes of a program, and the sums of the pixels are a tuple of tensors [BLOCK_LINES, BLOCK_CHANNELS]. For one
row of taps, a strip of four pixels and taps three wide:

    step       0   1   2   3   4   5     columns of x, from `left` on, each loaded once
    pixel 0   t0  t1  t2                 pixel p adds the input of step s
    pixel 1       t0  t1  t2             times the tap of column s - p
    pixel 2           t0  t1  t2
    pixel 3               t0  t1  t2

Each input stays in registers until it has been added to all sums that it belongs to. For kernels of 7 x 7 that is
one load for four to five multiplications, where a tile of pixels in one tensor takes one for each. Rows below each
other share most inputs, which a program that makes several finds in the L1 cache.

Output channel k reads input channel k // M. The gradient of x is the same sum with the taps the other way round,
over the M outputs of each channel.
"""

import triton
import triton.language as tl

from ..common.product import divide, widen


@triton.jit
def added(sums, index: tl.constexpr, term):
    """The tuple `sums` with `term` added to one element."""
    return sums[:index] + (sums[index] + term,) + sums[index + 1 :]


@triton.jit
def channels_if(condition, k, CHANNELS: tl.constexpr):
    """Which of the channels `k` exist, if the scalar `condition` is true, else none.

    Triton's interpreter takes no conjunction of a scalar with a tensor.
    """
    return k < tl.where(condition, CHANNELS, 0)


@triton.jit
def lines_of_program(
    lines, width, CHANNEL_BLOCKS: tl.constexpr, BLOCK_LINES: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """(lines, first column, channel block) of a program, the channel block varying fastest.

    A line is a row of an image, n * H + row; they are int64, [BLOCK_LINES, 1].
    """
    strips = (width + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    program = tl.program_id(0)
    strip = program // CHANNEL_BLOCKS
    line = (strip // strips).to(tl.int64) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)[:, None]
    return line, strip % strips * BLOCK_WIDTH, program % CHANNEL_BLOCKS


@triton.jit
def channels_of_block(first, BLOCK_LINES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The channels from `first` on in each line, [BLOCK_LINES, BLOCK_CHANNELS].

    What is loaded by them lies in the same lanes as the inputs of each line.
    """
    return tl.zeros((BLOCK_LINES, 1), tl.int32) + (first + tl.arange(0, BLOCK_CHANNELS))[None, :]


@triton.jit
def convolve_strip(
    x,  # (N, C, H, W), channels side by side
    taps,  # [kh * kw, outputs of the convolution], as the sums: float32, or float64
    line,  # [BLOCK_LINES, 1]: rows of the result, n * H + row
    lines,  # N * H
    first_column,  # the strip's first column
    k,  # [BLOCK_LINES, BLOCK_CHANNELS]: channels of the result
    height,
    width,
    x_image_stride,  # in units of STRIDE_UNIT
    x_row_stride,  # in units of STRIDE_UNIT
    STRIDE_UNIT: tl.constexpr,
    X_COLUMN_STRIDE: tl.constexpr,
    OUTPUTS: tl.constexpr,  # outputs of the convolution
    MULTIPLIER: tl.constexpr,  # outputs of each input channel
    TRANSPOSED: tl.constexpr,  # the gradient of x: x is the gradient of the outputs, the result that of the inputs
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The sums of BLOCK_WIDTH pixels of each line, from `first_column` on: a tuple of tensors like `k`."""
    TERMS: tl.constexpr = MULTIPLIER if TRANSPOSED else 1
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    image = line // height
    row = (line % height).to(tl.int32)
    left = first_column - KERNEL_WIDTH // 2
    zero = widen(tl.zeros(k.shape, x.dtype.element_ty))
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
            on_map = (line < lines) & (x_row >= 0) & (x_row < height)
            source = x + (image * x_image_stride + x_row * x_row_stride) * STRIDE_UNIT + x_channel
            source += left.to(tl.int64) * X_COLUMN_STRIDE
            tap_values = ()
            for tap_column in tl.static_range(KERNEL_WIDTH):
                tap = tap_row * KERNEL_WIDTH + tap_column
                if TRANSPOSED:
                    tap = TAPS - 1 - tap
                loaded = tl.load(taps + tap * OUTPUTS + output, mask=output < OUTPUTS, other=0.0)
                tap_values = tap_values + (loaded,)
            for step in tl.static_range(BLOCK_WIDTH + KERNEL_WIDTH - 1):
                column = left + step
                inside = on_map & channels_if((column >= 0) & (column < width), output, OUTPUTS)
                value = widen(tl.load(source + step * X_COLUMN_STRIDE, mask=inside, other=0.0))
                for pixel in tl.static_range(BLOCK_WIDTH):
                    if step - pixel >= 0 and step - pixel < KERNEL_WIDTH:
                        sums = added(sums, pixel, value * tap_values[step - pixel])
    return sums


@triton.jit(do_not_specialize=["lines", "height", "width"])
def stencil(
    x,  # (N, C, H, W), channels side by side
    taps,  # [kh * kw, outputs of the convolution], as the sums: float32, or float64
    bias,  # [K]
    y,  # (N, K, H, W), channels_last
    lines,  # N * H
    height,
    width,
    x_image_stride,  # in units of STRIDE_UNIT
    x_row_stride,  # in units of STRIDE_UNIT
    STRIDE_UNIT: tl.constexpr,
    X_COLUMN_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,  # K, of y
    OUTPUTS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The depthwise convolution, or the gradient of its input."""
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    line, first_column, block = lines_of_program(lines, width, CHANNEL_BLOCKS, BLOCK_LINES, BLOCK_WIDTH)
    k = channels_of_block(block * BLOCK_CHANNELS, BLOCK_LINES, BLOCK_CHANNELS)
    sums = convolve_strip(
        x,
        taps,
        line,
        lines,
        first_column,
        k,
        height,
        width,
        x_image_stride,
        x_row_stride,
        STRIDE_UNIT,
        X_COLUMN_STRIDE,
        OUTPUTS,
        MULTIPLIER,
        TRANSPOSED,
        KERNEL_HEIGHT,
        KERNEL_WIDTH,
        BLOCK_WIDTH,
    )
    shift = widen(tl.zeros(k.shape, x.dtype.element_ty))
    if HAS_BIAS:
        shift = widen(tl.load(bias + k, mask=k < CHANNELS, other=0.0))
    target = y + (line * width + first_column) * CHANNELS + k
    for pixel in tl.static_range(BLOCK_WIDTH):
        inside = (line < lines) & channels_if(first_column + pixel < width, k, CHANNELS)
        tl.store(target + pixel * CHANNELS, (sums[pixel] + shift).to(y.dtype.element_ty), mask=inside)


@triton.jit
def loaded_by_chunk(
    vector, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_LINES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """A vector [CHANNELS] as a tuple of CHUNKS tensors [BLOCK_LINES, BLOCK_CHANNELS], of zeros beyond its end."""
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        k = channels_of_block(chunk * BLOCK_CHANNELS, BLOCK_LINES, BLOCK_CHANNELS)
        chunks = chunks + (widen(tl.load(vector + k, mask=k < CHANNELS, other=0.0)),)
    return chunks


@triton.jit(do_not_specialize=["lines", "height", "width"])
def stencil_channel_norm(
    x,  # (N, C, H, W), channels side by side
    taps,  # [kh * kw, K], as the sums
    bias,  # [K]
    norm_weight,  # [K]
    norm_bias,  # [K]
    y,  # (N, K, H, W), channels_last
    normalised,  # as y: the norm without its weight and bias
    scale,  # [N * H * W]: 1 / sqrt(variance + eps)
    lines,  # N * H
    height,
    width,
    eps,
    x_image_stride,  # in units of STRIDE_UNIT
    x_row_stride,  # in units of STRIDE_UNIT
    STRIDE_UNIT: tl.constexpr,
    X_COLUMN_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,  # K
    MULTIPLIER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    KEEP_NORMALISED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,  # times BLOCK_CHANNELS at least K
    BLOCK_CHANNELS: tl.constexpr,
):
    """The depthwise convolution, then the layer norm of the channels of each pixel."""
    line, first_column, _ = lines_of_program(lines, width, 1, BLOCK_LINES, BLOCK_WIDTH)
    sums = ()
    for chunk in tl.static_range(CHUNKS):
        sums = sums + convolve_strip(
            x,
            taps,
            line,
            lines,
            first_column,
            channels_of_block(chunk * BLOCK_CHANNELS, BLOCK_LINES, BLOCK_CHANNELS),
            height,
            width,
            x_image_stride,
            x_row_stride,
            STRIDE_UNIT,
            X_COLUMN_STRIDE,
            CHANNELS,
            MULTIPLIER,
            False,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            BLOCK_WIDTH,
        )
    if HAS_BIAS:
        shifts = loaded_by_chunk(bias, CHANNELS, CHUNKS, BLOCK_LINES, BLOCK_CHANNELS)
    if HAS_NORM_WEIGHT:
        weights = loaded_by_chunk(norm_weight, CHANNELS, CHUNKS, BLOCK_LINES, BLOCK_CHANNELS)
    if HAS_NORM_BIAS:
        offsets = loaded_by_chunk(norm_bias, CHANNELS, CHUNKS, BLOCK_LINES, BLOCK_CHANNELS)
    for pixel in tl.static_range(BLOCK_WIDTH):
        column = first_column + pixel
        on_map = line < tl.where(column < width, lines, 0)
        values = ()
        total = widen(tl.zeros((BLOCK_LINES, BLOCK_CHANNELS), x.dtype.element_ty))
        for chunk in tl.static_range(CHUNKS):
            value = sums[chunk * BLOCK_WIDTH + pixel]
            if HAS_BIAS:
                value += shifts[chunk]
            values = values + (value,)
            total += value
        mean = divide(tl.sum(total, 1, keep_dims=True), CHANNELS * 1.0)
        squares = tl.zeros_like(total)
        for chunk in tl.static_range(CHUNKS):
            k = channels_of_block(chunk * BLOCK_CHANNELS, BLOCK_LINES, BLOCK_CHANNELS)
            value = tl.where(k < CHANNELS, values[chunk] - mean, 0.0)
            squares += value * value
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 1, keep_dims=True) / CHANNELS + eps)
        if KEEP_SCALE:
            tl.store(scale + (line * width + column), inverse, mask=on_map)
        for chunk in tl.static_range(CHUNKS):
            k = channels_of_block(chunk * BLOCK_CHANNELS, BLOCK_LINES, BLOCK_CHANNELS)
            inside = on_map & (k < CHANNELS)
            target = (line * width + column) * CHANNELS + k
            value = (values[chunk] - mean) * inverse
            if KEEP_NORMALISED:
                tl.store(normalised + target, value.to(normalised.dtype.element_ty), mask=inside)
            if HAS_NORM_WEIGHT:
                value *= weights[chunk]
            if HAS_NORM_BIAS:
                value += offsets[chunk]
            tl.store(y + target, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["lines", "rounds", "height", "width"])
def stencil_backward_taps(
    grad,  # (N, K, H, W), channels_last
    x,  # (N, C, H, W), channels side by side
    partials,  # [parts, kh * kw + 1, K]: gradients of taps and bias
    lines,  # N * H
    rounds,
    height,
    width,
    x_image_stride,  # in units of STRIDE_UNIT
    x_row_stride,  # in units of STRIDE_UNIT
    STRIDE_UNIT: tl.constexpr,
    X_COLUMN_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,  # K
    MULTIPLIER: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_TAP_ROWS: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The gradients of some rows of taps, from strips of BLOCK_WIDTH pixels.

    A program takes `rounds` times BLOCK_LINES strips, down the image and then to the right: most inputs of a strip
    are those of the strip above it, and in the L1 cache.
    """
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    TAP_BLOCKS: tl.constexpr = (KERNEL_HEIGHT + BLOCK_TAP_ROWS - 1) // BLOCK_TAP_ROWS
    program = tl.program_id(0)
    part = program // (CHANNEL_BLOCKS * TAP_BLOCKS)
    first_tap_row = program // CHANNEL_BLOCKS % TAP_BLOCKS * BLOCK_TAP_ROWS
    k = channels_of_block(program % CHANNEL_BLOCKS * BLOCK_CHANNELS, BLOCK_LINES, BLOCK_CHANNELS)
    strips = (width + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    zero = widen(tl.zeros(k.shape, grad.dtype.element_ty))
    sums = (zero,) * (BLOCK_TAP_ROWS * KERNEL_WIDTH)
    bias = zero
    for round in range(rounds):
        strip = (part * rounds + round) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)[:, None]
        row = strip % height
        first_column = strip // height % strips * BLOCK_WIDTH
        image = (strip // (height * strips)).to(tl.int64)
        real = strip < lines * strips
        left = first_column - KERNEL_WIDTH // 2
        source = grad + ((image * height + row) * width + first_column) * CHANNELS + k
        grads = ()
        for pixel in tl.static_range(BLOCK_WIDTH):
            inside = real & (first_column + pixel < width) & (k < CHANNELS)
            value = widen(tl.load(source + pixel * CHANNELS, mask=inside, other=0.0))
            grads = grads + (value,)
            bias += value
        for tap_row in tl.static_range(BLOCK_TAP_ROWS):
            x_row = row + first_tap_row + tap_row - KERNEL_HEIGHT // 2
            on_map = real & (x_row >= 0) & (x_row < height)
            source = x + (image * x_image_stride + x_row * x_row_stride) * STRIDE_UNIT + k // MULTIPLIER
            source += left.to(tl.int64) * X_COLUMN_STRIDE
            for step in tl.static_range(BLOCK_WIDTH + KERNEL_WIDTH - 1):
                column = left + step
                inside = on_map & (column >= 0) & (column < width) & (k < CHANNELS)
                value = widen(tl.load(source + step * X_COLUMN_STRIDE, mask=inside, other=0.0))
                for pixel in tl.static_range(BLOCK_WIDTH):
                    if step - pixel >= 0 and step - pixel < KERNEL_WIDTH:
                        sums = added(sums, tap_row * KERNEL_WIDTH + step - pixel, value * grads[pixel])
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    channel = program % CHANNEL_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    target = partials + part.to(tl.int64) * (TAPS + 1) * CHANNELS + channel
    for tap in tl.static_range(BLOCK_TAP_ROWS * KERNEL_WIDTH):
        number = first_tap_row * KERNEL_WIDTH + tap
        tl.store(
            target + number * CHANNELS, tl.sum(sums[tap], 0), mask=channels_if(number < TAPS, channel, CHANNELS)
        )
    # One program stores it: those of other rows of taps have the same sum.
    if first_tap_row == 0:
        tl.store(target + TAPS * CHANNELS, tl.sum(bias, 0), mask=channel < CHANNELS)
