"""What tests of the operations share: shapes, memory formats, random inputs, and the comparison with float64."""

import torch
from oracle import outputs_and_grads

# images, channels, height, width, multiplier, kernel
SHAPES = {
    "lecture 8x8": (16, 4, 8, 8, 4, (7, 7)),
    "lecture 4x4": (16, 5, 4, 4, 4, (7, 7)),
    "map smaller than the kernel": (7, 5, 2, 3, 3, (9, 5)),
    "one pixel": (2, 7, 1, 1, 4, (7, 7)),
    "one row": (3, 5, 1, 5, 1, (3, 3)),
    "one image": (1, 4, 7, 7, 4, (7, 7)),
    "odd and prime": (3, 7, 13, 11, 2, (5, 5)),
    "large map": (2, 5, 20, 17, 1, (7, 7)),
    "one tap": (5, 6, 6, 4, 3, (1, 1)),
}
FORMATS = ("contiguous", "channels_last", "batch_last", "sliced")


def in_format(x, name):
    if name == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if name == "batch_last":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if name == "sliced":
        images, channels, height, width = x.shape
        holder = x.new_full((images, channels + 1, 2 * height, width + 3), torch.nan)
        holder[:, 1:, ::2, 2:-1] = x
        return holder[:, 1:, ::2, 2:-1]
    return x


def random_block(shape, affine=True, bias=True, dtype=torch.float64):
    """x and the parameters of a convnext_block."""
    images, channels, height, width, multiplier, kernel = shape
    wide = channels * multiplier
    sizes = [
        (images, channels, height, width),
        (wide, 1, *kernel),
        (wide,) if bias else None,
        (channels, wide, 1, 1),
        (channels,) if bias else None,
        (channels, channels, 1, 1),
        (channels,) if bias else None,
        (wide,) if affine else None,
        (wide,) if affine else None,
    ]
    # Float32 values, so that all precisions compute with the same numbers.
    return [None if size is None else torch.randn(size).to(dtype) for size in sizes]


NAMES = (
    "x",
    "depthwise_weight",
    "depthwise_bias",
    "pointwise_weight",
    "pointwise_bias",
    "projection_weight",
    "projection_bias",
    "norm_weight",
    "norm_bias",
)


def as_dtype(inputs, dtype):
    return [None if x is None else x.to(dtype) for x in inputs]


def block(module, norm="tensor", approximate="none", eps=1e-5):
    def call(*inputs):
        *positional, norm_weight, norm_bias = inputs
        return module.convnext_block(
            *positional,
            norm=norm,
            eps=eps,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            approximate=approximate,
        )

    return call


def depthwise(module, norm="tensor", eps=1e-5):
    def call(x, weight, bias, norm_weight, norm_bias):
        return module.depthwise_conv_layer_norm(
            x, weight, bias, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias
        )

    return call


def norm_alone(module, norm="tensor"):
    def call(x, norm_weight, norm_bias):
        return module.layer_norm(x, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias)

    return call


def compare(
    ours, definition, inputs, names, layout="contiguous", dtype=torch.float32, autocast=False, device="cpu"
):
    """{name: (ours, PyTorch's in `dtype`, both on `device`, exact)} of the output and of each gradient."""
    inputs = as_dtype(as_dtype(inputs, dtype), torch.float64)
    grad = torch.randn(definition(*inputs).shape).to(dtype).double()
    exact = outputs_and_grads(definition, inputs, grad)
    low = [None if x is None else x.to(device) for x in as_dtype(inputs, dtype)]
    laid_out = [in_format(low[0], layout), *low[1:]]
    grad = grad.to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        mine = outputs_and_grads(ours, laid_out, in_format(grad, layout))
        other = outputs_and_grads(definition, low, grad)
    names = ["output", *(name for name, x in zip(names, inputs, strict=True) if x is not None)]
    return {name: (a.cpu(), b.cpu(), c) for name, a, b, c in zip(names, mine, other, exact, strict=True)}
