"""Every operation, forward and each gradient, against its definition in float64."""

import functools

import pytest
import torch
from cases import NAMES, SHAPES, block, depthwise, norm_alone, random_block
from oracle import assert_accurate
from torch.nn import functional as F

import fastconv
from fastconv.accuracy import FORMATS, as_dtype, compare, in_format, outputs_and_grads
from fastconv.kernels import decisions as kernel_decisions
from fastconv.kernels.common.values import Convolution, Norm
from fastconv.operations import columns, decisions, functional, portable, reference

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
def test_convnext_block(name, norm, affine):
    def sample():
        return compare(block(functional, norm), block(reference, norm), random_block(SHAPES[name], affine), NAMES)

    assert_accurate(sample)


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_depthwise_conv_layer_norm(name, norm, affine):
    def sample():
        x, weight, bias, *_, norm_weight, norm_bias = random_block(SHAPES[name], affine)
        inputs = [x, weight, bias, norm_weight, norm_bias]
        names = ["x", "weight", "bias", "norm_weight", "norm_bias"]
        return compare(depthwise(functional, norm), depthwise(reference, norm), inputs, names)

    assert_accurate(sample)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("approximate", functional.APPROXIMATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_pointwise_conv_gelu(name, approximate, layout):
    images, channels, height, width, multiplier, _ = SHAPES[name]
    outputs = channels * multiplier + 1
    ours = functools.partial(functional.pointwise_conv_gelu, approximate=approximate)
    definition = functools.partial(reference.pointwise_conv_gelu, approximate=approximate)

    def sample():
        sizes = (images, channels, height, width), (outputs, channels, 1, 1), (outputs,)
        inputs = [torch.randn(size) for size in sizes]
        return compare(ours, definition, inputs, ["x", "weight", "bias"], layout)

    assert_accurate(sample)


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_layer_norm(name, norm, affine):
    images, channels, height, width, _, _ = SHAPES[name]

    def sample():
        affine_map = torch.randn(2, channels).unbind() if affine else (None, None)
        inputs = [torch.randn(images, channels, height, width), *affine_map]
        names = ["x", "norm_weight", "norm_bias"]
        return compare(norm_alone(functional, norm), norm_alone(reference, norm), inputs, names)

    assert_accurate(sample)


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
    def sample():
        return compare(block(functional), block(reference), random_block(SHAPES[name]), NAMES, layout)

    assert_accurate(sample)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_the_output_has_the_memory_format_of_the_input(name, layout):
    x, *parameters = random_block(SHAPES[name])
    x = in_format(x, layout)
    for y in (
        block(functional)(x, *parameters),
        depthwise(functional)(x, *parameters[:2], *parameters[-2:]),
        functional.layer_norm(x),
        functional.pointwise_conv_gelu(x, parameters[4]),
    ):
        assert y.is_contiguous() == (layout == "contiguous")
        assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("name", ["lecture 4x4", "one image"])
def test_without_biases(name):
    def sample():
        inputs = random_block(SHAPES[name], affine=False, bias=False)
        return compare(block(functional), block(reference), inputs, NAMES)

    assert_accurate(sample)


@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_mean_a_thousand_times_the_standard_deviation(name, norm):
    def sample_block():
        x, weight, bias, *rest = random_block(SHAPES[name], affine=False)
        inputs = [x, weight * 0.1, bias + 1000, *rest]
        return compare(block(functional, norm), block(reference, norm), inputs, NAMES)

    def sample_norm():
        x = torch.randn(SHAPES[name][:4]) + 1000
        names = ["x", "norm_weight", "norm_bias"]
        return compare(norm_alone(functional, norm), norm_alone(reference, norm), [x, None, None], names)

    assert_accurate(sample_block)
    assert_accurate(sample_norm)


@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_expanded_gradient(name):
    inputs = as_dtype(random_block(SHAPES[name]), torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    for operation, arguments in [
        (block(functional), leaves),
        (depthwise(functional), [*leaves[:3], *leaves[-2:]]),
    ]:
        y = operation(*arguments)
        weights = torch.randn(y.shape[1])[:, None, None].expand(y.shape)
        dense = torch.autograd.grad(y, arguments, weights.clone())
        expanded = torch.autograd.grad(operation(*arguments), arguments, weights)
        for a, b in zip(expanded, dense, strict=True):
            torch.testing.assert_close(a, b)
        # The gradient of a sum: all ones, of stride 0.
        torch.autograd.grad(operation(*arguments).sum(), arguments)


@pytest.mark.parametrize("norm", functional.NORMS)
def test_empty_batch(norm):
    inputs = as_dtype(random_block((0, 3, 8, 8, 4, (7, 7))), torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    for operation, arguments, channels in [
        (block(functional, norm), leaves, 3),
        (depthwise(functional, norm), [*leaves[:3], *leaves[-2:]], 12),
    ]:
        y = operation(*arguments)
        assert y.shape == (0, channels, 8, 8)
        for x, grad in zip(arguments, torch.autograd.grad(y.sum(), arguments), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize("shape", [(4, 2, 3, 4, 2, (3, 5)), (1, 2, 3, 4, 2, (3, 3))], ids=["toeplitz", "direct"])
def test_gradcheck(shape, norm):
    leaves = [x.requires_grad_() for x in random_block(shape)]
    assert torch.autograd.gradcheck(block(functional, norm), leaves)
    assert torch.autograd.gradcheck(depthwise(functional, norm), [*leaves[:3], *leaves[-2:]])
    assert torch.autograd.gradcheck(norm_alone(functional, norm), [leaves[0], *torch.randn(2, 2).double()])
    assert torch.autograd.gradcheck(functional.pointwise_conv_gelu, [leaves[0], leaves[5], leaves[6]])
    assert torch.autograd.gradcheck(functional.patch_conv, [leaves[0], torch.randn(3, 2, 3, 2).double()])


def test_each_gradient_by_itself():
    inputs = random_block(SHAPES["lecture 4x4"])
    grad = torch.randn(inputs[0].shape).double()
    all_at_once = outputs_and_grads(block(functional), inputs, grad)[1:]
    for i, expected in enumerate(all_at_once):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        (found,) = torch.autograd.grad(block(functional)(*alone), [alone[i]], grad)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_repeat_and_do_not_change_what_was_given():
    leaves = [x.requires_grad_() for x in as_dtype(random_block(SHAPES["lecture 8x8"]), torch.float32)]
    y = block(functional)(*leaves)
    grad = torch.randn(y.shape)
    before = grad.clone()
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(y, leaves, grad)
    assert torch.equal(grad, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


DIFFERENTIABLE_ONCE = {
    "convnext_block": lambda p: block(functional)(*p),
    "depthwise_conv_layer_norm": lambda p: depthwise(functional)(*p[:3], *p[7:]),
    "layer_norm": lambda p: norm_alone(functional)(p[0], None, None),
}


@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y.square().sum()], ids=["sum", "square"])
@pytest.mark.parametrize("operation", DIFFERENTIABLE_ONCE)
def test_double_backward_raises_clearly(operation, loss):
    parameters = random_block(SHAPES["lecture 4x4"])
    parameters[0].requires_grad_()
    y = DIFFERENTIABLE_ONCE[operation](parameters)
    with pytest.raises(RuntimeError, match=r"differentiated once.*create_graph=True"):
        torch.autograd.grad(loss(y), parameters[:1], create_graph=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
@pytest.mark.parametrize("operation", DIFFERENTIABLE_ONCE)
def test_results_may_be_changed_in_place(operation, name, layout):
    parameters = as_dtype(random_block(SHAPES[name]), torch.float32)
    grads = []
    for change in (F.relu_, F.relu):
        x = parameters[0].detach().requires_grad_()
        y = DIFFERENTIABLE_ONCE[operation]([in_format(x, layout), *parameters[1:]])
        grads.append(torch.autograd.grad(change(y).square().sum(), x)[0])
    assert torch.equal(*grads)


def test_meta_tensors_have_the_shapes_of_real_ones():
    parameters = [x.to("meta") for x in random_block(SHAPES["lecture 8x8"])]
    y = block(functional)(*parameters)
    assert y.is_meta
    assert y.shape == parameters[0].shape


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_without_gradients_the_values_are_the_same(name, mode):
    inputs = as_dtype(random_block(SHAPES[name]), torch.float32)
    expected = block(functional)(*[x.detach().requires_grad_() for x in inputs])
    with mode():
        y = block(functional)(*inputs)
    assert not y.requires_grad
    assert torch.equal(y, expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("norm", functional.NORMS)
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_half_precision(name, norm, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16

    def sample():
        inputs = random_block(SHAPES[name])
        ours, definition = block(functional, norm), block(reference, norm)
        return compare(ours, definition, inputs, NAMES, dtype=dtype, autocast=autocast)

    assert_accurate(sample, torch.bfloat16)


def test_autocast_dtypes():
    inputs = as_dtype(random_block(SHAPES["lecture 8x8"]), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depthwise(functional)(*inputs[:3], *inputs[-2:]).dtype == torch.bfloat16
        assert functional.pointwise_conv_gelu(inputs[0], inputs[5]).dtype == torch.bfloat16
        assert functional.patch_conv(inputs[0], inputs[5]).dtype == torch.bfloat16
        assert functional.layer_norm(inputs[0].bfloat16()).dtype == torch.float32
        # The residual stream stays as it is.
        assert block(functional)(*inputs).dtype == torch.float32
        assert block(functional)(*as_dtype(inputs, torch.float64)).dtype == torch.float64


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
    compiled = torch.compile(block(functional, norm), fullgraph=True, backend="aot_eager")
    for size in sizes:
        inputs = as_dtype(random_block((*size, 4, (7, 7))), torch.float32)
        grad = torch.randn(size)
        expected = outputs_and_grads(block(functional, norm), inputs, grad)
        for a, b in zip(outputs_and_grads(compiled, inputs, grad), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("images", [1, 16], ids=["channels last", "batch last"])
def test_every_implementation_refuses_an_unknown_norm(images):
    x, norm = torch.randn(images, 2, 8, 8), Norm("batch", 1e-5, None, None)
    conv = Convolution(torch.randn(4, 1, 3, 3), None)
    for call in (
        lambda: reference.layer_norm(x, norm="batch"),
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
    inputs = random_block((images, channels, side, side, multiplier, (7, 7)), dtype=torch.float32)
    depthwise(functional)(*inputs[:3], *inputs[-2:])
    assert ("depthwise_conv_layer_norm" in called) == convolution
    block(functional)(*inputs)
    assert ("convnext_block" in called) == whole


@pytest.mark.parametrize("name", SHAPES)
def test_a_copy_by_tiles_copies_the_same(name, monkeypatch):
    inputs = as_dtype(random_block(SHAPES[name]), torch.float32)
    leaves = [*inputs[:3], *inputs[-2:]]
    grad = torch.randn_like(depthwise(functional)(*leaves))
    expected = outputs_and_grads(depthwise(functional), leaves, grad)
    monkeypatch.setattr(columns, "LEAST_TILED", 1)
    found = outputs_and_grads(depthwise(functional), leaves, grad)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert found[0].is_contiguous()
