"""Convolutions of patches that do not overlap, as matrix products, and the norms beside them, with gradients.

Rows are patches of images: one program takes BLOCK_IMAGES x BLOCK_PATCHES of them, and all outputs. The stem reads
images as bytes, where they lie, and writes the moments of its result; the downsampling normalises what it reads.
Both norms span the whole tensor.

P is the number of patches in an image, and of pixels of the map that they become, O the channels of that map, C
those of the maps that patches are cut out of, K = C * PATCH * PATCH the elements of a patch.
"""

import triton
import triton.language as tl

from ..common.product import product, widen
from ..common.reduction import accumulate
from ..common.statistics import mean_and_scale, merge_sums, store_moments, store_sums, values_in_group


@triton.jit
def rows_of_block(block, PATCHES: tl.constexpr, BLOCK_IMAGES: tl.constexpr, BLOCK_PATCHES: tl.constexpr):
    """The image of each row of a block, int64 [rows], and its patch in the image, int32 [rows]."""
    PATCH_BLOCKS: tl.constexpr = (PATCHES + BLOCK_PATCHES - 1) // BLOCK_PATCHES
    row = tl.arange(0, BLOCK_IMAGES * BLOCK_PATCHES)
    image = block // PATCH_BLOCKS * BLOCK_IMAGES + row // BLOCK_PATCHES
    return image, (block % PATCH_BLOCKS).to(tl.int32) * BLOCK_PATCHES + row % BLOCK_PATCHES


@triton.jit
def elements_of_patches(
    patch,  # [rows], numbered row by row
    k,  # [inputs], elements of a patch in the order of a weight's
    COLUMNS: tl.constexpr,  # patches side by side
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Offsets in maps [C, HEIGHT, WIDTH], of less than 2^31 elements, and which are inside: [rows, inputs]."""
    y = (patch // COLUMNS * PATCH)[:, None] + (k // PATCH % PATCH)[None, :]
    x = (patch % COLUMNS * PATCH)[:, None] + (k % PATCH)[None, :]
    channel = (k // (PATCH * PATCH))[None, :]
    return (channel * HEIGHT + y) * WIDTH + x, (y < HEIGHT) & (x < WIDTH)


@triton.jit
def load_bytes(
    images,  # uint8 [M, C, HEIGHT, WIDTH]
    image,  # int64 [rows]
    inside,  # [rows]
    patch,  # [rows]
    k,  # [inputs]
    INPUTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Patches of images, 0 to 255, in float32: [rows, inputs]."""
    offset, _ = elements_of_patches(patch, k, WIDTH // PATCH, HEIGHT, WIDTH, PATCH)
    offset += image[:, None] * (INPUTS // (PATCH * PATCH) * HEIGHT * WIDTH)
    return tl.load(images + offset, mask=inside[:, None] & (k < INPUTS)[None, :], other=0).to(tl.float32)


@triton.jit
def stem_forward(
    images,  # uint8 [M, C, HEIGHT, WIDTH]
    order,  # int64 [at least position + N]: which images
    position,  # int64 [1]: where in `order` the batch starts
    weight,  # [O, K]
    bias,  # [O]
    y,  # [N, O, P]
    moments,  # [1, 3, parts]
    batch,  # N
    parts,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,  # a power of two, at least OUTPUTS
):
    """y = weight patches / 255 + bias, and its moments."""
    PATCHES: tl.constexpr = (HEIGHT // PATCH) * (WIDTH // PATCH)
    program = tl.program_id(0).to(tl.int64)
    n, p = rows_of_block(program, PATCHES, BLOCK_IMAGES, BLOCK_PATCHES)
    inside = (n < batch) & (p < PATCHES)
    image = tl.load(order + tl.load(position) + n, mask=inside, other=0)
    o = tl.arange(0, BLOCK_OUTPUTS)

    values = widen(tl.zeros((BLOCK_IMAGES * BLOCK_PATCHES, BLOCK_OUTPUTS), weight.dtype.element_ty))
    for first in range(0, INPUTS, BLOCK_INPUTS):
        k = first + tl.arange(0, BLOCK_INPUTS)
        tile = load_bytes(images, image, inside, p, k, INPUTS, HEIGHT, WIDTH, PATCH)
        w_mask = (k < INPUTS)[:, None] & (o < OUTPUTS)[None, :]
        w_tile = tl.load(weight + o[None, :] * INPUTS + k[:, None], mask=w_mask, other=0.0)  # [K, O]
        # Every dtype holds these integers exactly, and not their 255th parts.
        values += product(tile.to(w_tile.dtype), w_tile, PRECISION)
    values = values / 255.0 + widen(tl.load(bias + o, mask=o < OUTPUTS, other=0.0))[None, :]
    y_tile = values.to(y.dtype.element_ty)
    y_mask = inside[:, None] & (o < OUTPUTS)[None, :]
    tl.store(y + (n[:, None] * OUTPUTS + o[None, :]) * PATCHES + p[:, None], y_tile, mask=y_mask)
    # The moments of what the norm is given: beside a large bias, rounding changes mean and variance.
    store_moments(widen(y_tile), y_mask, moments, 0, 1, program, parts, "tensor")


@triton.jit
def stem_backward(
    images,  # uint8 [M, C, HEIGHT, WIDTH]
    order,  # int64 [at least position + N]: which images
    position,  # int64 [1]: where in `order` the batch starts
    grad,  # [N, O, P]: the gradient of the normalised maps
    y,  # [N, O, P]
    moments,  # [1, 3, parts], of y
    sums,  # [1, 2, sum_parts]: sums of grad, and of grad * normalised
    partials,  # [programs, O * K + O]: gradients of weight and bias
    batch,  # N
    rounds,
    parts,
    sum_parts,
    eps,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """The gradients of weight and bias, summed over a program's rounds; images need none.

    grad_y = r (grad - mean(grad) - normalised * mean(grad * normalised)), with r = 1 / sqrt(variance + eps).
    """
    PATCHES: tl.constexpr = (HEIGHT // PATCH) * (WIDTH // PATCH)
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(position)
    o = tl.arange(0, BLOCK_OUTPUTS)
    weight_grad = partials + program * (OUTPUTS * INPUTS + OUTPUTS)
    bias_grad = weight_grad + OUTPUTS * INPUTS
    mean, scale = mean_and_scale(moments, 0, 1, parts, eps, "tensor", BLOCK_PARTS)
    grad_sum, slope_sum = merge_sums(sums, sum_parts, BLOCK_PARTS)
    count = values_in_group(OUTPUTS * PATCHES, batch, "tensor")

    for round in range(rounds):
        n, p = rows_of_block(program * rounds + round, PATCHES, BLOCK_IMAGES, BLOCK_PATCHES)
        inside = (n < batch) & (p < PATCHES)
        image = tl.load(order + start + n, mask=inside, other=0)
        mask = inside[:, None] & (o < OUTPUTS)[None, :]
        offset = (n[:, None] * OUTPUTS + o[None, :]) * PATCHES + p[:, None]
        normalised = (widen(tl.load(y + offset, mask=mask, other=0.0)) - mean) * scale
        grad_y = widen(tl.load(grad + offset, mask=mask, other=0.0))
        grad_y = scale * (grad_y - grad_sum / count - normalised * (slope_sum / count))
        grad_y = tl.where(mask, grad_y, 0.0)  # [rows, O]
        accumulate(bias_grad + o, tl.sum(grad_y, 0), o < OUTPUTS, round == 0)
        grad_y = grad_y.to(grad.dtype.element_ty)
        for first in range(0, INPUTS, BLOCK_INPUTS):
            k = first + tl.arange(0, BLOCK_INPUTS)
            tile = load_bytes(images, image, inside, p, k, INPUTS, HEIGHT, WIDTH, PATCH)
            matrix = product(tl.trans(grad_y), tile.to(grad_y.dtype), PRECISION) / 255.0
            w_mask = (o < OUTPUTS)[:, None] & (k < INPUTS)[None, :]
            accumulate(weight_grad + o[:, None] * INPUTS + k[None, :], matrix, w_mask, round == 0)


@triton.jit
def downsample_forward(
    x,  # [N, C, HEIGHT, WIDTH]
    moments,  # [1, 3, parts], of x
    weight,  # [O, K]
    bias,  # [O]
    y,  # [N, O, P]
    images,  # N
    parts,
    eps,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,  # a power of two, at least OUTPUTS
):
    """y = weight patches(normalised) + bias, with normalised = (x - mean) / sqrt(variance + eps)."""
    COLUMNS: tl.constexpr = WIDTH // PATCH
    PATCHES: tl.constexpr = HEIGHT // PATCH * COLUMNS
    program = tl.program_id(0).to(tl.int64)
    n, p = rows_of_block(program, PATCHES, BLOCK_IMAGES, BLOCK_PATCHES)
    inside = ((n < images) & (p < PATCHES))[:, None]
    x_rows = x + n[:, None] * (INPUTS // (PATCH * PATCH) * HEIGHT * WIDTH)
    o = tl.arange(0, BLOCK_OUTPUTS)
    mean, scale = mean_and_scale(moments, 0, 1, parts, eps, "tensor", BLOCK_PARTS)

    values = widen(tl.zeros((BLOCK_IMAGES * BLOCK_PATCHES, BLOCK_OUTPUTS), weight.dtype.element_ty))
    for first in range(0, INPUTS, BLOCK_INPUTS):
        k = first + tl.arange(0, BLOCK_INPUTS)
        offset, _ = elements_of_patches(p, k, COLUMNS, HEIGHT, WIDTH, PATCH)
        mask = inside & (k < INPUTS)[None, :]
        normalised = tl.where(mask, (widen(tl.load(x_rows + offset, mask=mask, other=0.0)) - mean) * scale, 0.0)
        w_mask = (k < INPUTS)[:, None] & (o < OUTPUTS)[None, :]
        w_tile = tl.load(weight + o[None, :] * INPUTS + k[:, None], mask=w_mask, other=0.0)  # [K, O]
        values += product(normalised.to(w_tile.dtype), w_tile, PRECISION)
    values += widen(tl.load(bias + o, mask=o < OUTPUTS, other=0.0))[None, :]
    y_offset = (n[:, None] * OUTPUTS + o[None, :]) * PATCHES + p[:, None]
    tl.store(y + y_offset, values.to(y.dtype.element_ty), mask=inside & (o < OUTPUTS)[None, :])


@triton.jit
def downsample_backward(
    grad,  # [N, O, P]: the gradient of y
    x,  # [N, C, HEIGHT, WIDTH]
    moments,  # [1, 3, parts], of x
    weight,  # [O, K]
    g,  # [N, C, HEIGHT, WIDTH]: the gradient of the normalised maps
    sums,  # [1, 2, programs]: sums of g, and of g * normalised
    partials,  # [programs, O * K + O]: gradients of weight and bias
    images,  # N
    rounds,
    parts,
    sum_parts,  # programs
    eps,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """The gradient of the normalised maps; and those of weight and bias, summed over a program's rounds.

    Rows are patches that cover the map. Those that its edge cuts were left out of y, and have the gradient 0.
    """
    COLUMNS: tl.constexpr = (WIDTH + PATCH - 1) // PATCH
    COVERING: tl.constexpr = (HEIGHT + PATCH - 1) // PATCH * COLUMNS
    WHOLE_ROWS: tl.constexpr = HEIGHT // PATCH
    WHOLE_COLUMNS: tl.constexpr = WIDTH // PATCH
    program = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK_OUTPUTS)
    weight_grad = partials + program * (OUTPUTS * INPUTS + OUTPUTS)
    bias_grad = weight_grad + OUTPUTS * INPUTS
    mean, scale = mean_and_scale(moments, 0, 1, parts, eps, "tensor", BLOCK_PARTS)
    g_sum = widen(tl.zeros((BLOCK_IMAGES * BLOCK_PATCHES, BLOCK_INPUTS), weight.dtype.element_ty))
    slope_sum = tl.zeros_like(g_sum)

    for round in range(rounds):
        n, patch = rows_of_block(program * rounds + round, COVERING, BLOCK_IMAGES, BLOCK_PATCHES)
        inside = (n < images) & (patch < COVERING)
        is_whole = inside & (patch // COLUMNS < WHOLE_ROWS) & (patch % COLUMNS < WHOLE_COLUMNS)
        p = patch // COLUMNS * WHOLE_COLUMNS + patch % COLUMNS
        grad_offset = (n[:, None] * OUTPUTS + o[None, :]) * (WHOLE_ROWS * WHOLE_COLUMNS) + p[:, None]
        grad_mask = is_whole[:, None] & (o < OUTPUTS)[None, :]
        grad_tile = tl.load(grad + grad_offset, mask=grad_mask, other=0.0)  # [rows, O]
        accumulate(bias_grad + o, tl.sum(widen(grad_tile), 0), o < OUTPUTS, round == 0)
        # Not unrolled: the compiler would read ahead more than registers hold.
        for first in range(0, INPUTS, BLOCK_INPUTS):
            k = first + tl.arange(0, BLOCK_INPUTS)
            offset, in_map = elements_of_patches(patch, k, COLUMNS, HEIGHT, WIDTH, PATCH)
            offset += n[:, None] * (INPUTS // (PATCH * PATCH) * HEIGHT * WIDTH)
            mask = inside[:, None] & in_map & (k < INPUTS)[None, :]
            normalised = (widen(tl.load(x + offset, mask=mask, other=0.0)) - mean) * scale
            normalised = tl.where(mask, normalised, 0.0)
            w_mask = (o < OUTPUTS)[:, None] & (k < INPUTS)[None, :]
            w_offset = o[:, None] * INPUTS + k[None, :]
            w_tile = tl.load(weight + w_offset, mask=w_mask, other=0.0)  # [O, K]
            g_tile = product(grad_tile, w_tile, PRECISION)
            tl.store(g + offset, g_tile.to(g.dtype.element_ty), mask=mask)
            matrix = product(tl.trans(grad_tile), normalised.to(grad_tile.dtype), PRECISION)
            accumulate(weight_grad + w_offset, matrix, w_mask, round == 0)
            g_sum += g_tile
            slope_sum += g_tile * normalised
    store_sums(g_sum, slope_sum, sums, 0, 1, program, sum_parts, "tensor")
