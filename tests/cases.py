"""What tests of the operations share: shapes, and the comparison of an operation with its definition."""

import torch
from oracle import assert_accurate

from fastconv import accuracy
from fastconv.accuracy import compare
from fastconv.checking import inputs, problems
from fastconv.checking.inputs import Input, Sizes
from fastconv.operations import functional

NORMED = ("convnext_block", "depthwise_conv_layer_norm", "layer_norm")

# images, channels, height, width, multiplier, kernel
SHAPES = {
    "lecture 8x8": Sizes(12, 2, 8, 8, 4, (7, 7)),
    "lecture 4x4": Sizes(7, 3, 4, 4, 4, (7, 7)),
    "map smaller than the kernel": Sizes(7, 3, 2, 3, 3, (9, 5)),
    "one pixel": Sizes(2, 5, 1, 1, 3, (7, 7)),
    "one row": Sizes(3, 5, 1, 5, 1, (3, 3)),
    "one image": Sizes(1, 3, 7, 7, 2, (7, 7)),
    "odd and prime": Sizes(3, 3, 11, 7, 2, (5, 5)),
    "large map": Sizes(2, 5, 20, 17, 1, (7, 7)),
    "one tap": Sizes(5, 3, 6, 4, 3, (1, 1)),
}


def draw(operation, sizes, device="cpu", dtype=torch.float32, affine=True, bias=True):
    """{name: tensor} of an operation's arguments, None for those that it goes without."""
    tensors = inputs.draw(operation, Input(sizes, affine=affine, bias=bias))
    return {name: None if x is None else x.to(device, dtype) for name, x in tensors.items()}


def draw_leaves(*arguments, **options):
    """Like `draw`, each tensor with a gradient."""
    return {name: x.requires_grad_() for name, x in draw(*arguments, **options).items()}


def assert_operation_accurate(
    operation,
    sizes,
    layout="contiguous",
    affine=True,
    bias=True,
    mean=0.0,
    dtype=torch.float32,
    autocast=False,
    device="cpu",
    samples=accuracy.SAMPLES,
    **options,
):
    """Our operation, and each of its gradients, are as close to float64 as those of its definition."""

    def sample():
        given = Input(sizes, layout, affine, bias, mean)
        ours, definition, tensors = problems.operation_problem(operation, given, options)
        return compare(ours, definition, tensors.values(), tensors, layout, dtype, autocast, device)

    assert_accurate(sample, torch.bfloat16 if autocast else dtype, samples)


def assert_gradcheck(operation, sizes, norm="tensor", **options):
    """Our gradients in float64 agree with difference quotients; `norm` is for operations that have one."""
    leaves = draw_leaves(operation, sizes, dtype=torch.float64)
    fixed = {"norm": norm} if operation in NORMED else {}
    function = getattr(functional, operation)
    assert torch.autograd.gradcheck(
        lambda *tensors: function(**dict(zip(leaves, tensors, strict=True)), **fixed),
        tuple(leaves.values()),
        **options,
    )


def results(function, leaves, grad):
    """The value of `function`, called with {name: tensor}, and its gradient for each of these."""
    y = function(**leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]
