"""Mean and variance over many programs, without E[x^2] - E[x]^2: Chan, Golub and LeVeque's pairwise merge.

T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979. Each program that writes part of a tensor writes the count, the mean and the sum of squared
deviations M2 of its part; each program that reads the tensor merges them all itself. "Moments" are these,
[groups, 3, parts], with one group for the norm "tensor" and one for each image for "sample". No atomics: results
repeat bit for bit.

What belongs to one group is a scalar, what belongs to the images of a program a column, [IMAGES, 1]. A scalar must
not be a tensor of one element: Triton 3.6 may then keep what it was summed from whole in every thread.
"""

import triton
import triton.language as tl


@triton.jit
def total(values, EACH_ROW: tl.constexpr):
    """The sum of all values, or of each row: a scalar, or [rows, 1]."""
    return tl.sum(values, 1, keep_dims=True) if EACH_ROW else tl.sum(values)


@triton.jit
def check_norm(NORM: tl.constexpr):
    """Refuse at compile time a norm that would be taken for "sample"."""
    tl.static_assert(NORM == "tensor" or NORM == "sample", 'NORM is "tensor" or "sample"')


@triton.jit
def norm_group(image, NORM: tl.constexpr):
    """The group of each image."""
    check_norm(NORM)
    return 0 if NORM == "tensor" else image


@triton.jit
def start_of_group(values, image, images, length, NORM: tl.constexpr):
    """Where the group of each image starts, or of images outside the last one's; a group has `length` values."""
    check_norm(NORM)
    return values if NORM == "tensor" else values + tl.minimum(image, images - 1) * length


@triton.jit
def part_of_group(in_batch, in_image, NORM: tl.constexpr):
    """The part that a program writes, from its number in the batch, and in its image or block of images."""
    return in_batch if NORM == "tensor" else in_image


@triton.jit
def values_in_group(IN_IMAGE: tl.constexpr, images, NORM: tl.constexpr):
    """How many values a group has, as a float32, from those of an image."""
    count = IN_IMAGE * 1.0
    if NORM == "tensor":
        count *= images
    return count


@triton.jit
def store_moments(
    values,  # [IMAGES, PIXELS], or of one image [PIXELS]
    mask,  # the same
    moments,  # [groups, 3, parts]
    image,  # int64, [IMAGES, 1], or one
    images,
    part,
    parts,
    NORM: tl.constexpr,
):
    """Write the moments of one part: of all `values`, or of those of each image."""
    EACH_ROW: tl.constexpr = NORM == "sample" and len(values.shape) == 2
    weights = mask.to(values.dtype)
    count = total(weights, EACH_ROW)
    divisor = tl.maximum(count, 1)
    mean = total(values * weights, EACH_ROW) / divisor
    # The rounding of a large mean shows in the sum of the deviations, and is taken back.
    mean += total((values - mean) * weights, EACH_ROW) / divisor
    deviation = (values - mean) * weights
    group = norm_group(image, NORM)
    inside = group < images
    target = moments + group * 3 * parts + part
    tl.store(target, count, mask=inside)
    tl.store(target + parts, mean, mask=inside)
    tl.store(target + 2 * parts, total(deviation * deviation, EACH_ROW), mask=inside)


@triton.jit
def part_range(first, BLOCK_PARTS: tl.constexpr, EACH_ROW: tl.constexpr):
    """[BLOCK_PARTS], or beside a column of groups [1, BLOCK_PARTS]."""
    part = first + tl.arange(0, BLOCK_PARTS)
    return part[None, :] if EACH_ROW else part


@triton.jit
def merge_moments(
    start,  # where the moments of a group start, [3, parts]: a pointer, or those of several groups, [GROUPS, 1]
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """The count, the mean and M2 of whole groups, each like `start`."""
    EACH_ROW: tl.constexpr = len(start.shape) == 2
    # Means are summed as differences from one of them: where they are large the sum would lose digits.
    pivot = tl.load(start + parts)
    count = tl.zeros_like(pivot)
    shift = tl.zeros_like(pivot)
    deviations = tl.zeros_like(pivot)
    for first in range(0, parts, BLOCK_PARTS):
        part = part_range(first, BLOCK_PARTS, EACH_ROW)
        inside = part < parts
        counts = tl.load(start + part, mask=inside, other=0.0)  # [GROUPS, BLOCK_PARTS], or [BLOCK_PARTS]
        shifts = tl.load(start + parts + part, mask=inside, other=0.0) - pivot
        squares = tl.load(start + 2 * parts + part, mask=inside, other=0.0)
        block_count = total(counts, EACH_ROW)
        block_shift = total(counts * shifts, EACH_ROW) / block_count
        squares += counts * (shifts - block_shift) * (shifts - block_shift)
        difference = block_shift - shift
        new_count = count + block_count
        deviations += total(squares, EACH_ROW) + difference * difference * (count * block_count / new_count)
        shift += difference * (block_count / new_count)
        count = new_count
    return count, pivot + shift, deviations


@triton.jit
def mean_and_scale(
    moments,  # [groups, 3, parts]
    image,  # int64, [IMAGES, 1], or one
    images,
    parts,
    eps,
    NORM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of a norm: scalars for "tensor", else like `image`."""
    start = start_of_group(moments, image, images, 3 * parts, NORM)
    count, mean, deviations = merge_moments(start, parts, BLOCK_PARTS)
    return mean, tl.rsqrt(deviations / count + eps)


@triton.jit
def collapse_moments(
    moments,  # [groups, 3, parts]
    result,  # [groups, 3, 1]
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """Merge the moments of each group into one part, where there are too many for every reader to merge."""
    group = tl.program_id(0).to(tl.int64)
    count, mean, deviations = merge_moments(moments + group * 3 * parts, parts, BLOCK_PARTS)
    tl.store(result + group * 3, count)
    tl.store(result + group * 3 + 1, mean)
    tl.store(result + group * 3 + 2, deviations)


@triton.jit
def store_sums(
    first,  # [IMAGES, PIXELS], or of one image [PIXELS]; zeros outside
    second,  # the same
    sums,  # [groups, 2, parts]
    image,  # int64, [IMAGES, 1], or one
    images,
    part,
    parts,
    NORM: tl.constexpr,
):
    """Write one part of the two sums of a norm's backward: of all values, or of those of each image."""
    EACH_ROW: tl.constexpr = NORM == "sample" and len(first.shape) == 2
    group = norm_group(image, NORM)
    inside = group < images
    target = sums + group * 2 * parts + part
    tl.store(target, total(first, EACH_ROW), mask=inside)
    tl.store(target + parts, total(second, EACH_ROW), mask=inside)


@triton.jit
def merge_sums(
    start,  # where the sums of a group start, [2, parts]: a pointer, or those of several groups, [GROUPS, 1]
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """The two sums of whole groups, each like `start`."""
    EACH_ROW: tl.constexpr = len(start.shape) == 2
    source = start + part_range(0, BLOCK_PARTS, EACH_ROW)
    first = tl.zeros(source.shape, start.dtype.element_ty)
    second = tl.zeros(source.shape, start.dtype.element_ty)
    for block in range(0, parts, BLOCK_PARTS):
        inside = part_range(block, BLOCK_PARTS, EACH_ROW) < parts
        first += tl.load(source + block, mask=inside, other=0.0)
        second += tl.load(source + block + parts, mask=inside, other=0.0)
    return total(first, EACH_ROW), total(second, EACH_ROW)


@triton.jit
def collapse_sums(
    sums,  # [groups, 2, parts]
    result,  # [groups, 2, 1]
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """Merge the two sums of each group into one part."""
    group = tl.program_id(0).to(tl.int64)
    first, second = merge_sums(sums + group * 2 * parts, parts, BLOCK_PARTS)
    tl.store(result + group * 2, first)
    tl.store(result + group * 2 + 1, second)
