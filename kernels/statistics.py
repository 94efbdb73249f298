"""Mean and variance over many programs, without E[x^2] - E[x]^2: Chan, Golub and LeVeque's pairwise merge.

Each program that writes part of a tensor writes the count, the mean and the sum of squared deviations M2 of its
part; each program that reads the tensor merges them itself. "Moments" are these, [3, groups, parts], with one group
for the norm "tensor" and one for each image for "sample".
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
    image,  # [IMAGES], int64
    images,
    parts,
    eps,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least parts
):
    """Mean and 1 / sqrt(variance + eps): [1] for the norm "tensor", else [IMAGES]."""
    part = tl.arange(0, PARTS)[None, :]
    if NORM == "tensor":
        group = tl.zeros((1, 1), tl.int64)
    else:
        group = tl.minimum(image, images - 1)[:, None]
    source = moments + group * 3 * parts + part
    inside = part < parts
    count = tl.load(source, mask=inside, other=0.0)  # [1 or IMAGES, PARTS]
    part_mean = tl.load(source + parts, mask=inside, other=0.0)
    deviations = tl.load(source + 2 * parts, mask=inside, other=0.0)
    # Means are summed as differences from one of them: where they are large the sum would lose digits.
    pivot = tl.load(moments + group * 3 * parts + parts)
    total = tl.sum(count, 1)
    mean = tl.sum(count * (part_mean - pivot), 1)[:, None] / total[:, None] + pivot
    difference = part_mean - mean
    deviations = tl.sum(deviations + count * difference * difference, 1)
    return tl.reshape(mean, (mean.shape[0],)), tl.rsqrt(deviations / total + eps)


@triton.jit
def store_sums(
    first,  # [IMAGES, PIXELS]
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
    image,  # [IMAGES], int64
    images,
    parts,
    count,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least parts
):
    """The two means of a norm's backward: [1] for the norm "tensor", else [IMAGES]."""
    part = tl.arange(0, PARTS)[None, :]
    if NORM == "tensor":
        group = tl.zeros((1, 1), tl.int64)
        count = count * 1.0 * images
    else:
        group = tl.minimum(image, images - 1)[:, None]
    source = sums + group * 2 * parts + part
    first = tl.sum(tl.load(source, mask=part < parts, other=0.0), 1)
    second = tl.sum(tl.load(source + parts, mask=part < parts, other=0.0), 1)
    return first / count, second / count
