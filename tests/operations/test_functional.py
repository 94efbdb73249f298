"""Every operation, forward and each gradient, against its definition in float64."""

import functools

import pytest
import torch
from cases import NORMED, SHAPES, assert_gradcheck, assert_operation_accurate, draw, draw_leaves, results
from oracle import assert_accurate
from torch.nn import functional as F

import fastconv
from fastconv.accuracy import FORMATS, compare
from fastconv.checking.inputs import Sizes
from fastconv.kernels import decisions as kernel_decisions
from fastconv.kernels.common.values import Convolution, Norm
from fastconv.operations import decisions, functional, layouts, portable, reference

TOEPLITZ = {
    "lecture 8x8",
    "lecture 4x4",
    "map smaller than the kernel",
    "one pixel",
    "one row",
    "one image",
    "one tap",
}


@pytest.fixture(autouse=True)
def _portable(nothing_small):
    with fastconv.backend("portable"):
        yield


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_cover_both_forms_of_the_convolution(name):
    images, _, height, width, _, _ = SHAPES[name]
    assert (decisions.layout(images, height * width) == "batch last") == (name in TOEPLITZ)


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("operation", NORMED)
def test_operations_with_a_norm(operation, name, norm, affine):
    assert_operation_accurate(operation, SHAPES[name], affine=affine, norm=norm)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("approximate", functional.APPROXIMATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_pointwise_conv_gelu(name, approximate, layout):
    assert_operation_accurate("pointwise_conv_gelu", SHAPES[name], layout, approximate=approximate)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("size", "weight_size"),
    [
        ((16, 3, 32, 32), (8, 3, 4, 4)),
        ((16, 6, 8, 8), (12, 6, 2, 2)),
        ((3, 2, 11, 13), (5, 2, 3, 2)),
        ((1, 3, 64, 64), (4, 3, 4, 4)),
        ((8, 4, 3, 3), (10, 4, 1, 1)),
    ],
    ids=str,
)
def test_patch_conv(size, weight_size, layout):
    def definition(x, weight, bias):
        return F.conv2d(x, weight, bias, stride=weight_size[2:])

    def sample():
        inputs = [torch.randn(size), torch.randn(weight_size), torch.randn(weight_size[0])]
        return compare(functional.patch_conv, definition, inputs, ["x", "weight", "bias"], layout)

    assert_accurate(sample)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_memory_formats_of_the_input(name, layout):
    assert_operation_accurate("convnext_block", SHAPES[name], layout)


@pytest.mark.parametrize("name", ["lecture 4x4", "one image"])
def test_without_biases(name):
    assert_operation_accurate("convnext_block", SHAPES[name], affine=False, bias=False)


@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_mean_a_thousand_times_the_standard_deviation(name, norm):
    for operation in ("convnext_block", "layer_norm"):
        assert_operation_accurate(operation, SHAPES[name], affine=False, mean=1000.0, norm=norm)


@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize(
    "sizes", [Sizes(4, 2, 3, 4, 2, (3, 5)), Sizes(1, 2, 3, 4, 2, (3, 3))], ids=["toeplitz", "direct"]
)
def test_gradcheck(sizes, norm):
    for operation in (*NORMED, "pointwise_conv_gelu", "patch_conv"):
        assert_gradcheck(operation, sizes, norm)


def test_meta_tensors_have_the_shapes_of_real_ones():
    tensors = draw("convnext_block", SHAPES["lecture 8x8"], "meta")
    y = functional.convnext_block(**tensors)
    assert y.is_meta
    assert y.shape == tensors["x"].shape


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_half_precision(name, norm, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    assert_operation_accurate("convnext_block", SHAPES[name], dtype=dtype, autocast=autocast, norm=norm)


@pytest.mark.parametrize("norm", functional.NORMS)
def test_gradients_in_float16_are_finite_where_those_of_pytorch_are(norm):
    # 100 times 100, of which a thousand are added, is too large for float16 unless it is normalised first.
    x, grad = (torch.randn(16, channels, 8, 8).mul(100).half() for channels in (8, 32))
    weight = torch.randn(32, 1, 7, 7).div(7).half()
    for name, tensors, given in (
        ("depthwise_conv_layer_norm", (x, weight), grad),
        ("layer_norm", (x,), grad[:, :8]),
    ):
        for module in (reference, functional):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            y = getattr(module, name)(*leaves, norm=norm)
            assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y, leaves, given)), module.__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["tensor", "sample"])
@pytest.mark.parametrize("value", [100.7, 17893.3, 1e-6])
def test_the_norm_of_a_constant_is_zero(value, norm, dtype):
    # The mean of 31 x 81 of them is not this number, but for a last digit.
    x = torch.full((3, 31, 9, 9), value, dtype=dtype)
    assert not functional.layer_norm(x, norm=norm).any()


def test_the_norm_of_a_single_value_has_no_gradient():
    leaves = draw_leaves("convnext_block", Sizes(3, 1, 1, 1, 1, (3, 3)))
    y = functional.convnext_block(**leaves, norm="sample")
    x, taps = torch.autograd.grad(y.sum(), [leaves["x"], leaves["depthwise_weight"]])
    # What is left is the residual connection's.
    assert torch.equal(x, torch.ones_like(x))
    assert not taps.any()


def test_values_near_the_least_of_float16_are_normalised_as_by_pytorch():
    x = torch.randn(4, 8, 8, 8).mul(1e-6).half()
    exact = reference.layer_norm(x.double(), eps=1e-14)
    errors = [(f(x, eps=1e-14).double() - exact).norm() for f in (functional.layer_norm, reference.layer_norm)]
    assert errors[0] <= 2 * errors[1]


def test_autocast_dtypes():
    tensors = {name: draw(name, SHAPES["lecture 8x8"]) for name in (*NORMED, "pointwise_conv_gelu", "patch_conv")}
    double = draw("convnext_block", SHAPES["lecture 8x8"], dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("depthwise_conv_layer_norm", "pointwise_conv_gelu", "patch_conv"):
            assert getattr(functional, name)(**tensors[name]).dtype == torch.bfloat16
        assert functional.layer_norm(tensors["layer_norm"]["x"].bfloat16()).dtype == torch.float32
        # The residual stream stays as it is.
        assert functional.convnext_block(**tensors["convnext_block"]).dtype == torch.float32
        assert functional.convnext_block(**double).dtype == torch.float64


@pytest.mark.parametrize(
    ("norm", "sizes"),
    [
        # To the second, sizes that differ are symbols.
        ("tensor", [(8, 3, 4, 4), (9, 3, 4, 4)]),
        ("tensor", [(3, 3, 11, 7), (2, 3, 12, 9)]),
        ("sample", [(8, 3, 4, 4)]),
        ("channel", [(3, 3, 11, 7)]),
    ],
)
def test_compile_without_graph_breaks(norm, sizes):
    torch.compiler.reset()
    eager = functools.partial(functional.convnext_block, norm=norm)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for size in sizes:
        leaves, grad = draw_leaves("convnext_block", Sizes(*size, 4, (7, 7))), torch.randn(size)
        expected, found = (results(function, leaves, grad) for function in (eager, compiled))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def zeros(*size, **options):
    return torch.zeros(size, **options)


X = zeros(2, 3, 8, 8)
BAD_INPUTS = {
    "not a tensor": (lambda: functional.layer_norm([1.0]), TypeError, "x is a list; expected a tensor"),
    "integers": (lambda: functional.layer_norm(X.int()), TypeError, r"torch.int32; expected floating point"),
    "no batch": (
        lambda: functional.layer_norm(X[0]),
        ValueError,
        r"shape \(3, 8, 8\); expected \(N, C, H, W\)",
    ),
    "no pixels": (
        lambda: functional.layer_norm(X[:, :, :0]),
        ValueError,
        "at least one channel and one pixel",
    ),
    "unknown norm": (
        lambda: functional.layer_norm(X, norm="batch"),
        ValueError,
        "'batch'; expected one of tensor",
    ),
    "negative eps": (
        lambda: functional.layer_norm(X, eps=-1.0),
        ValueError,
        r"eps is -1.0; expected at least 0",
    ),
    "norm_weight of integers": (
        lambda: functional.layer_norm(X, norm_weight=zeros(3, dtype=torch.int64)),
        TypeError,
        r"norm_weight has dtype torch.int64; expected floating point: convert it with \.float\(\)",
    ),
    "norm_weight of the wrong length": (
        lambda: functional.layer_norm(X, norm_weight=zeros(4)),
        ValueError,
        r"norm_weight has shape \(4,\); expected \(3,\)",
    ),
    "channels that do not divide": (
        lambda: functional.depthwise_conv_layer_norm(X, zeros(8, 1, 7, 7)),
        ValueError,
        r"weight has shape \(8, 1, 7, 7\); expected \(3 \* multiplier, 1, height, width\)",
    ),
    "a full convolution's weight": (
        lambda: functional.depthwise_conv_layer_norm(X, zeros(12, 3, 7, 7)),
        ValueError,
        r"weight has shape \(12, 3, 7, 7\)",
    ),
    "even kernel": (
        lambda: functional.depthwise_conv_layer_norm(X, zeros(12, 1, 7, 4)),
        ValueError,
        "kernel of 7 x 4; expected odd sides",
    ),
    "bias of the wrong length": (
        lambda: functional.depthwise_conv_layer_norm(X, zeros(12, 1, 7, 7), zeros(3)),
        ValueError,
        r"bias has shape \(3,\); expected \(12,\)",
    ),
    "mixed dtypes": (
        lambda: functional.depthwise_conv_layer_norm(X, zeros(12, 1, 7, 7, dtype=torch.float64)),
        TypeError,
        "weight has dtype torch.float64, x torch.float32; convert one",
    ),
    "mixed devices": (
        lambda: functional.depthwise_conv_layer_norm(X, zeros(12, 1, 7, 7, device="meta")),
        ValueError,
        "weight is on meta, x on cpu; move them to one device",
    ),
    "pointwise inputs": (
        lambda: functional.pointwise_conv_gelu(X, zeros(5, 4, 1, 1)),
        ValueError,
        r"weight has shape \(5, 4, 1, 1\); expected \(outputs, 3, 1, 1\)",
    ),
    "unknown approximation": (
        lambda: functional.pointwise_conv_gelu(X, zeros(5, 3, 1, 1), approximate="sigmoid"),
        ValueError,
        "'sigmoid'; expected one of none, tanh",
    ),
    "projection outputs": (
        lambda: functional.convnext_block(
            X, zeros(12, 1, 7, 7), None, zeros(5, 12, 1, 1), None, zeros(4, 5, 1, 1), None
        ),
        ValueError,
        "projection_weight has 4 outputs; expected the 3 channels of x",
    ),
    "patch larger than the image": (
        lambda: functional.patch_conv(X, zeros(4, 3, 9, 9)),
        ValueError,
        "x is 8 x 8 pixels; expected at least one patch of 9 x 9",
    ),
    "patch inputs": (
        lambda: functional.patch_conv(X, zeros(4, 1, 2, 2)),
        ValueError,
        r"weight has shape \(4, 1, 2, 2\); expected \(outputs, 3, height, width\)",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name):
    call, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        call()


# Maps on each side of the portable path's decisions: PyTorch's own operations, and both layouts of columns.
@pytest.mark.parametrize("shape", [(1, 4, 7, 7), (64, 4, 4, 4), (16, 64, 20, 20)], ids=str)
def test_every_implementation_refuses_an_unknown_norm(shape, monkeypatch):
    monkeypatch.undo()
    x, norm = torch.zeros(shape), Norm("batch", 1e-5, None, None)
    conv = Convolution(torch.zeros(4 * shape[1], 1, 3, 3), None)
    for call in (
        lambda: reference.layer_norm(x, norm="batch"),
        lambda: reference.depthwise_conv_layer_norm(x, *conv, norm="batch"),
        lambda: portable.layer_norm(x, norm),
        lambda: portable.depthwise_conv_layer_norm(x, conv, norm),
        lambda: kernel_decisions.layer_norm(x, norm),
        lambda: kernel_decisions.depthwise_conv_layer_norm(x, conv, norm),
        lambda: kernel_decisions.convnext_block(x, conv, norm),
    ):
        with pytest.raises(ValueError, match="norm is 'batch'; expected one of tensor, sample, channel"):
            call()


# images, channels, side, multiplier, and whether the convolution alone, and the block, are small.
SMALL = {
    "one image": ((1, 8, 8, 4), True, True),
    "few images for their Toeplitz matrices": ((4, 8, 7, 4), True, True),
    "enough images for them": ((5, 8, 7, 4), False, False),
    "a small convolution": ((8, 32, 8, 4), True, False),
    "a large convolution": ((9, 32, 8, 4), False, False),
    "a small block": ((4, 32, 8, 4), True, True),
    "one large image": ((1, 33, 32, 2), False, False),
}


@pytest.mark.parametrize("case", SMALL)
def test_pytorch_computes_what_is_small(case, monkeypatch):
    (images, channels, side, multiplier), convolution, whole = SMALL[case]
    monkeypatch.undo()
    called = []

    def record(name):
        function = getattr(reference, name)

        def recorded(*inputs, **options):
            called.append(name)
            return function(*inputs, **options)

        monkeypatch.setattr(reference, name, recorded)

    record("depthwise_conv_layer_norm")
    record("convnext_block")
    sizes = Sizes(images, channels, side, side, multiplier, (7, 7))
    for operation, small in (("depthwise_conv_layer_norm", convolution), ("convnext_block", whole)):
        getattr(functional, operation)(**draw(operation, sizes))
        assert (operation in called) == small


@pytest.mark.parametrize("name", SHAPES)
def test_a_copy_by_tiles_copies_the_same(name, monkeypatch):
    operation = functional.depthwise_conv_layer_norm
    leaves = draw_leaves("depthwise_conv_layer_norm", SHAPES[name])
    grad = torch.randn_like(operation(**leaves))
    expected = results(operation, leaves, grad)
    monkeypatch.setattr(layouts, "LEAST_TILED", 1)
    found = results(operation, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].is_contiguous()
