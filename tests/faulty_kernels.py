"""Device functions of the kernels with a fault in each, for `fastconv check` to find."""

import triton
import triton.language as tl


@triton.jit
def store_moments(values, mask, moments, image, images, part, parts, NORM: tl.constexpr):
    """For the norm "tensor": the variance as E[x^2] - E[x]^2."""
    weights = mask.to(values.dtype)
    count = tl.sum(weights)
    mean = tl.sum(values * weights) / count
    tl.store(moments + part, count)
    tl.store(moments + parts + part, mean)
    tl.store(moments + 2 * parts + part, tl.sum(values * values * weights) - count * mean * mean)


@triton.jit
def element_offset(element, image, image_stride, channel_stride, pixel_stride, PIXELS: tl.constexpr):
    """Pixels side by side, whatever their stride."""
    return image * image_stride + element // PIXELS * channel_stride + element % PIXELS


@triton.jit
def load_toeplitz(
    taps,
    q,
    p,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
):
    """Without the kernel's first row of taps that reaches into a map of 4 x 4."""
    row = (q // WIDTH)[:, None] - (p // WIDTH)[None, :] + KERNEL_HEIGHT // 2
    column = (q % WIDTH)[:, None] - (p % WIDTH)[None, :] + KERNEL_WIDTH // 2
    inside = (row > 0) & (row < KERNEL_HEIGHT) & (column >= 0) & (column < KERNEL_WIDTH)
    inside &= (q < HEIGHT * WIDTH)[:, None] & (p < HEIGHT * WIDTH)[None, :]
    return tl.load(taps + row * KERNEL_WIDTH + column, mask=inside, other=0.0)


@triton.jit
def store_nothing(values, mask, moments, image, images, part, parts, NORM: tl.constexpr):
    """In place of `store_moments`: it does not compile."""
    tl.static_assert(NORM == "none", "a planted fault")


@triton.jit
def store_by_a_large_product(values, mask, moments, image, images, part, parts, NORM: tl.constexpr):
    """In place of `store_moments`: its operands take more shared memory than any GPU has."""
    row = tl.arange(0, 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    matrix = tl.load(moments + row)
    tl.store(moments + row, tl.dot(matrix, tl.trans(matrix), input_precision="tf32"))
