"""The head of the classifier on a batch: logits, cross entropy, correct answers, and gradients, in one launch.

    pooled = mean of x over pixels
    logits = weight @ pooled + bias
    loss = logsumexp(logits) - logits[label], averaged over the batch
    grad_logits = (softmax(logits) - onehot(label)) / N
    grad_x = weight^T @ grad_logits / P, at each pixel

All of it is computed in float32, or float64 for float64 maps, whatever the dtype of maps and weight.
"""

import triton
import triton.language as tl

from ..common.product import widen
from ..common.reduction import accumulate


@triton.jit
def load_weight(weight, j, c, CLASSES: tl.constexpr, CHANNELS: tl.constexpr):
    """[len(j), len(c)], with zeros outside."""
    inside = (j < CLASSES)[:, None] & (c < CHANNELS)[None, :]
    return widen(tl.load(weight + j[:, None] * CHANNELS + c[None, :], mask=inside, other=0.0))


@triton.jit
def mean_over_pixels(
    maps,  # [C, P], of one image
    c,  # [BLOCK_CHANNELS]
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """[BLOCK_CHANNELS], with zeros outside."""
    total = widen(tl.zeros((c.shape[0], BLOCK_PIXELS), maps.dtype.element_ty))
    for first in tl.static_range(0, PIXELS, BLOCK_PIXELS):
        p = first + tl.arange(0, BLOCK_PIXELS)
        inside = (c < CHANNELS)[:, None] & (p < PIXELS)[None, :]
        total += widen(tl.load(maps + c[:, None] * PIXELS + p[None, :], mask=inside, other=0.0))
    return tl.sum(total, 1) / PIXELS


@triton.jit
def largest_and_prediction(logits, j, CLASSES: tl.constexpr):
    """The largest number, and the class that torch.argmax takes: the first NaN, else the first of the largest."""
    is_nan = logits != logits
    largest = tl.max(tl.where(is_nan, float("-inf"), logits), 0)
    has_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    is_candidate = tl.where(has_nan, is_nan, logits == largest)
    return largest, tl.min(tl.where(is_candidate, j, CLASSES), 0)


@triton.jit
def head(
    x,  # [N, C, P]
    weight,  # [classes, C]
    bias,  # [classes]
    labels,  # [M]
    order,  # [count]: numbers of images, with their labels
    position,  # [1]: where in `order` the batch starts
    losses,  # [programs]: sums over a program's images
    correct,  # [programs]: how many of a program's images are classified right
    grad_x,  # [N, C, P]
    partials,  # [programs, classes * C + classes]: gradients of weight and bias
    images,
    rounds,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    HAS_GRADIENTS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """One program: `rounds` images, one after the other, with all classes; BLOCK_CHANNELS at a time."""
    program = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_CLASSES)
    start = tl.load(position)
    loss = tl.full((), 0.0, losses.dtype.element_ty)
    hits = tl.full((), 0, correct.dtype.element_ty)
    first = program * rounds
    for n in range(first, tl.minimum(first + rounds, images)):
        maps = x + n * (CHANNELS * PIXELS)
        logits = widen(tl.load(bias + j, mask=j < CLASSES, other=0.0))
        for first_channel in range(0, CHANNELS, BLOCK_CHANNELS):
            c = first_channel + tl.arange(0, BLOCK_CHANNELS)
            pooled = mean_over_pixels(maps, c, CHANNELS, PIXELS, BLOCK_PIXELS)
            logits += tl.sum(load_weight(weight, j, c, CLASSES, CHANNELS) * pooled[None, :], 1)
        logits = tl.where(j < CLASSES, logits, float("-inf"))

        label = tl.load(labels + tl.load(order + start + n))
        largest, prediction = largest_and_prediction(logits, j, CLASSES)
        hits += (prediction == label).to(hits.dtype)
        shifted = logits - largest
        exponentials = tl.exp(shifted)
        total = tl.sum(exponentials, 0)
        loss += tl.log(total) - tl.sum(tl.where(j == label, shifted, 0.0), 0)

        if HAS_GRADIENTS:
            grad_logits = (exponentials / total - tl.where(j == label, 1.0, 0.0)) / images
            store_gradients(
                maps,
                weight,
                grad_logits,
                grad_x + n * (CHANNELS * PIXELS),
                partials + program * (CLASSES * CHANNELS + CLASSES),
                n == first,
                CLASSES,
                CHANNELS,
                PIXELS,
                BLOCK_CLASSES,
                BLOCK_CHANNELS,
                BLOCK_PIXELS,
            )
    tl.store(losses + program, loss)
    tl.store(correct + program, hits)


@triton.jit
def store_gradients(
    maps,  # [C, P], of one image
    weight,  # [classes, C]
    grad_logits,  # [BLOCK_CLASSES], with zeros outside
    grad_maps,  # [C, P]
    partials,  # [classes * C + classes]: the image's gradients of weight and bias are added
    is_first,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    j = tl.arange(0, BLOCK_CLASSES)
    accumulate(partials + CLASSES * CHANNELS + j, grad_logits, j < CLASSES, is_first)
    for first_channel in range(0, CHANNELS, BLOCK_CHANNELS):
        c = first_channel + tl.arange(0, BLOCK_CHANNELS)
        inside = (j < CLASSES)[:, None] & (c < CHANNELS)[None, :]
        pooled = mean_over_pixels(maps, c, CHANNELS, PIXELS, BLOCK_PIXELS)
        weight_grad = grad_logits[:, None] * pooled[None, :]
        accumulate(partials + j[:, None] * CHANNELS + c[None, :], weight_grad, inside, is_first)
        products = load_weight(weight, j, c, CLASSES, CHANNELS) * grad_logits[:, None]
        grad_pixel = (tl.sum(products, 0) / PIXELS).to(grad_maps.dtype.element_ty)
        for first_pixel in tl.static_range(0, PIXELS, BLOCK_PIXELS):
            p = first_pixel + tl.arange(0, BLOCK_PIXELS)
            inside = (c < CHANNELS)[:, None] & (p < PIXELS)[None, :]
            grad = tl.broadcast_to(grad_pixel[:, None], inside.shape)
            tl.store(grad_maps + c[:, None] * PIXELS + p[None, :], grad, mask=inside)
