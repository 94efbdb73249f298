"""Partial weight gradients: kept by each program, then summed in a fixed order; results repeat bit for bit."""

import triton
import triton.language as tl


@triton.jit
def accumulate(target, values, mask, is_first):
    """Add `values` to what this program keeps at `target`; store them if they are the first."""
    # Which of its threads stored an element is for the compiler to choose.
    tl.debug_barrier()
    tl.store(target, values + tl.load(target, mask=mask & (is_first == 0), other=0.0), mask=mask)


@triton.jit
def reduce_partials(
    columns,  # [rows, LENGTH]
    matrices,  # [blocks, outputs, P, P], with input pixels first
    biases,  # [blocks, outputs]
    result,  # [LENGTH + outputs * taps + outputs]: sums of columns, gradients of taps, sums of biases
    rows,
    blocks,
    outputs,
    LENGTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """The first programs each sum BLOCK_COLUMNS columns, the others each fold the matrices of one output."""
    COLUMN_PROGRAMS: tl.constexpr = (LENGTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0).to(tl.int64)
    if program < COLUMN_PROGRAMS:
        sum_column_block(columns, result, program, rows, LENGTH, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        fold_onto_taps(
            matrices,
            biases,
            result + LENGTH,
            program - COLUMN_PROGRAMS,
            blocks,
            outputs,
            HEIGHT,
            WIDTH,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            BLOCK_TAPS,
            BLOCK_PIXELS,
        )


@triton.jit
def sum_columns(
    columns,  # [rows, LENGTH]
    result,  # [LENGTH]
    rows,
    LENGTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sum_column_block(columns, result, program, rows, LENGTH, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def sum_column_block(
    columns,  # [rows, length]
    result,  # [length]
    block,
    rows,
    length,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), columns.dtype.element_ty)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < length)[None, :]
        total += tl.load(columns + row[:, None].to(tl.int64) * length + column[None, :], mask=inside, other=0.0)
    tl.store(result + column, tl.sum(total, 0), mask=column < length)


@triton.jit
def fold_onto_taps(
    matrices,  # [blocks, outputs, P, P], with input pixels first
    biases,  # [blocks, outputs]
    result,  # [outputs * taps + outputs]
    k,  # the output
    blocks,
    outputs,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    bias = tl.load(biases + k) * 0
    for block in range(blocks):
        bias += tl.load(biases + block * outputs + k)
    tl.store(result + outputs * TAPS + k, bias)
    # The kernel is turned around, and its rows are padded to a power of two: so the compiler sees that taps follow
    # each other in memory, and threads side by side read along a row of the matrix. Pixels follow each other along
    # its diagonal, where each element is in another cache line.
    PADDED: tl.constexpr = triton.next_power_of_2(KERNEL_WIDTH)
    for first in tl.static_range(0, KERNEL_HEIGHT * PADDED, BLOCK_TAPS):
        place = first + tl.arange(0, BLOCK_TAPS)[None, :]
        row, column = place // PADDED, place % PADDED
        is_tap = (row < KERNEL_HEIGHT) & (column < KERNEL_WIDTH)
        total = tl.zeros((BLOCK_PIXELS, BLOCK_TAPS), matrices.dtype.element_ty)
        for block in range(blocks):
            matrix = matrices + (block * outputs + k) * PIXELS * PIXELS
            for first_pixel in tl.static_range(0, PIXELS, BLOCK_PIXELS):
                q = first_pixel + tl.arange(0, BLOCK_PIXELS)[:, None]
                # The output pixel that sees input pixel q through the tap.
                p_row = q // WIDTH + row - (KERNEL_HEIGHT - 1) // 2
                p_column = q % WIDTH + column - (KERNEL_WIDTH - 1) // 2
                inside = is_tap & (q < PIXELS)
                inside &= (p_row >= 0) & (p_row < HEIGHT) & (p_column >= 0) & (p_column < WIDTH)
                total += tl.load(matrix + q * PIXELS + p_row * WIDTH + p_column, mask=inside, other=0.0)
        tap = (KERNEL_HEIGHT - 1 - row) * KERNEL_WIDTH + KERNEL_WIDTH - 1 - column
        tl.store(result + (k * TAPS + tap), tl.sum(total, 0)[None, :], mask=is_tap)
