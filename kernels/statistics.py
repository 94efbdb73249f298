"""Mean and variance over many programs, without E[x^2] - E[x]^2: Chan, Golub and LeVeque's pairwise merge.

T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979. Each program that writes part of a tensor writes the count, the mean and the sum of squared
deviations M2 of its part; each program that reads the tensor merges them all itself. "Moments" are these,
[groups, 3, parts], with one group for the norm "tensor" and one for each image for "sample". No atomics: results
repeat bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def store_moments(
    values,  # [IMAGES, PIXELS]
    mask,  # the same
    moments,  # [groups, 3, parts]
    image,  # [IMAGES], int64
    images,
    part,
    parts,
    NORM: tl.constexpr,
):
    """Write the moments of one part: of all `values`, or of those of each image."""
    weights = mask.to(values.dtype)
    if NORM == "tensor":
        count = tl.sum(weights)
        mean = tl.sum(values * weights) / count
        # The rounding of a large mean shows in the sum of the deviations, and is taken back.
        mean += tl.sum((values - mean) * weights) / count
        deviation = (values - mean) * weights
        tl.store(moments + part, count)
        tl.store(moments + parts + part, mean)
        tl.store(moments + 2 * parts + part, tl.sum(deviation * deviation))
    else:
        count = tl.sum(weights, 1)
        divisor = tl.maximum(count, 1)
        mean = tl.sum(values * weights, 1) / divisor
        mean += tl.sum((values - mean[:, None]) * weights, 1) / divisor
        deviation = (values - mean[:, None]) * weights
        inside = image < images
        target = moments + image * 3 * parts + part
        tl.store(target, count, mask=inside)
        tl.store(target + parts, mean, mask=inside)
        tl.store(target + 2 * parts, tl.sum(deviation * deviation, 1), mask=inside)


@triton.jit
def merge_moments(
    moments,  # [groups, 3, parts]
    group,  # [GROUPS], int64
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """The count, the mean and M2 of whole groups, each [GROUPS]."""
    start = moments + group * 3 * parts
    # Means are summed as differences from one of them: where they are large the sum would lose digits.
    pivot = tl.load(start + parts)
    count = tl.zeros_like(pivot)
    shift = tl.zeros_like(pivot)
    deviations = tl.zeros_like(pivot)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[None, :]
        source = start[:, None] + part
        inside = part < parts
        counts = tl.load(source, mask=inside, other=0.0)  # [GROUPS, BLOCK_PARTS]
        shifts = tl.load(source + parts, mask=inside, other=0.0) - pivot[:, None]
        squares = tl.load(source + 2 * parts, mask=inside, other=0.0)
        block_count = tl.sum(counts, 1)
        block_shift = tl.sum(counts * shifts, 1) / block_count
        squares += counts * (shifts - block_shift[:, None]) * (shifts - block_shift[:, None])
        difference = block_shift - shift
        total = count + block_count
        deviations += tl.sum(squares, 1) + difference * difference * (count * block_count / total)
        shift += difference * (block_count / total)
        count = total
    return count, pivot + shift, deviations


@triton.jit
def mean_and_scale(
    moments,  # [groups, 3, parts]
    image,  # [IMAGES], int64
    images,
    parts,
    eps,
    NORM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of a norm: [1] for "tensor", else [IMAGES]."""
    count, mean, deviations = merge_moments(moments, norm_group(image, images, NORM), parts, BLOCK_PARTS)
    return mean, tl.rsqrt(deviations / count + eps)


@triton.jit
def norm_group(image, images, NORM: tl.constexpr):
    """Which group images belong to: [1] for "tensor", else [IMAGES], within bounds."""
    return tl.zeros((1,), tl.int64) if NORM == "tensor" else tl.minimum(image, images - 1)


@triton.jit
def collapse_moments(
    moments,  # [groups, 3, parts]
    result,  # [groups, 3, 1]
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """Merge the moments of each group into one part, where there are too many for every reader to merge."""
    group = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    count, mean, deviations = merge_moments(moments, group, parts, BLOCK_PARTS)
    tl.store(result + group * 3, count)
    tl.store(result + group * 3 + 1, mean)
    tl.store(result + group * 3 + 2, deviations)


@triton.jit
def store_sums(
    first,  # [IMAGES, PIXELS], zeros outside
    second,  # the same
    sums,  # [groups, 2, parts]
    image,  # [IMAGES], int64
    images,
    part,
    parts,
    NORM: tl.constexpr,
):
    """Write one part of the two sums of a norm's backward: of all values, or of those of each image."""
    if NORM == "tensor":
        tl.store(sums + part, tl.sum(first))
        tl.store(sums + parts + part, tl.sum(second))
    else:
        target = sums + image * 2 * parts + part
        tl.store(target, tl.sum(first, 1), mask=image < images)
        tl.store(target + parts, tl.sum(second, 1), mask=image < images)


@triton.jit
def merge_sums(
    sums,  # [groups, 2, parts]
    group,  # [GROUPS], int64
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """The two sums of whole groups, each [GROUPS]."""
    start = sums + group * 2 * parts
    part = tl.arange(0, BLOCK_PARTS)[None, :]
    first = tl.zeros((start.shape[0], BLOCK_PARTS), sums.dtype.element_ty)
    second = tl.zeros((start.shape[0], BLOCK_PARTS), sums.dtype.element_ty)
    for block in range(0, parts, BLOCK_PARTS):
        source = start[:, None] + block + part
        inside = block + part < parts
        first += tl.load(source, mask=inside, other=0.0)
        second += tl.load(source + parts, mask=inside, other=0.0)
    return tl.sum(first, 1), tl.sum(second, 1)


@triton.jit
def collapse_sums(
    sums,  # [groups, 2, parts]
    result,  # [groups, 2, 1]
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """As `collapse_moments`, for the sums."""
    group = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    first, second = merge_sums(sums, group, parts, BLOCK_PARTS)
    tl.store(result + group * 2, first)
    tl.store(result + group * 2 + 1, second)
