"""The C++ kernel of patches and of pointwise convolution + GELU, against float64."""

import functools

import pytest
import torch
from cases import results
from oracle import assert_accurate

import fastconv
from fastconv.accuracy import FORMATS, compare, in_format
from fastconv.checking.inputs import draw_parameter
from fastconv.kernels.common.values import Convolution
from fastconv.kernels.cpu import library, patches
from fastconv.operations import decisions, functional, reference

# images, inputs, height, width, outputs, patch; a vector has 4, 8 or 16 images.
PATCHES = {
    "stem": (17, 3, 16, 16, 9, (4, 4)),
    "downsampling": (32, 6, 8, 8, 12, (2, 2)),
    "head": (33, 5, 4, 4, 10, (1, 1)),
    "left-over pixels": (7, 2, 11, 13, 5, (3, 2)),
    "one patch": (1, 3, 2, 5, 4, (2, 5)),
    "one number": (3, 1, 1, 1, 1, (1, 1)),
}
# images, inputs, height, width, outputs
POINTWISE = {
    "lecture": (3, 32, 8, 8, 8),
    "less than a vector": (5, 7, 1, 3, 13),
    "vectors and a rest": (2, 4, 7, 7, 6),
    "several strips": (3, 9, 23, 29, 5),
    "one number": (1, 1, 1, 1, 1),
}
APPROXIMATIONS = functional.APPROXIMATIONS

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _three_slots(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(patches, "LEAST_WORK", 1)
    with fastconv.backend("native"):
        yield


@pytest.fixture(params=["patch_conv", *(f"pointwise_conv_gelu, {approximate}" for approximate in APPROXIMATIONS)])
def operation(request):
    name, *approximate = request.param.split(", ")
    options = {"approximate": approximate[0]} if approximate else {}
    return functools.partial(getattr(functional, name), **options)


def draw(sizes, bias=True):
    images, channels, height, width, outputs, *patch = sizes
    weight = draw_parameter((outputs, channels, *(patch[0] if patch else (1, 1))))
    return [torch.randn(images, channels, height, width), weight, torch.randn(outputs) if bias else None]


def leaves_of(*tensors):
    return {name: x.clone().requires_grad_() for name, x in zip(("x", "weight", "bias"), tensors, strict=True)}


def conv(x, weight, bias):
    return torch.nn.functional.conv2d(x, weight, bias, stride=weight.shape[2:])


def assert_right(ours, definition, sizes, layout="contiguous", bias=True):
    names = "x", "weight", "bias"
    assert_accurate(lambda: compare(ours, definition, draw(sizes, bias), names, layout))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", PATCHES)
def test_patch_conv(name, layout):
    assert_right(functional.patch_conv, conv, PATCHES[name], layout)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_conv_gelu(name, layout, approximate):
    ours, definition = (
        functools.partial(module.pointwise_conv_gelu, approximate=approximate)
        for module in (functional, reference)
    )
    assert_right(ours, definition, POINTWISE[name], layout)


def test_without_bias():
    assert_right(functional.patch_conv, conv, PATCHES["left-over pixels"], bias=False)
    operations = functional.pointwise_conv_gelu, reference.pointwise_conv_gelu
    assert_right(*operations, POINTWISE["vectors and a rest"], bias=False)


def test_images_at_each_place_of_a_vector(operation):
    """Images do not see each other, nor the lanes beyond the last."""
    x, weight, bias = draw((40, 3, 2, 3, 5))
    expected = operation(x, weight, bias)
    lanes = library.load().fastconv_lanes()
    for images in (1, lanes - 1, lanes, lanes + 1, 2 * lanes + 1):
        torch.testing.assert_close(operation(x[:images], weight, bias), expected[:images])
    x[3] = torch.nan
    y = operation(x, weight, bias)
    assert y[3].isnan().all()
    assert torch.equal(y[4:], expected[4:])


@pytest.mark.parametrize("layout", ["contiguous", "batch_last"])
def test_each_gradient_by_itself(operation, layout):
    x, *parameters = draw((9, 4, 3, 5, 6))
    leaves = leaves_of(in_format(x, layout), *parameters)
    y, *grads = results(operation, leaves, torch.ones(9, 6, 3, 5))
    for name, expected in zip(leaves, grads, strict=True):
        alone = {other: tensor.detach().requires_grad_(other == name) for other, tensor in leaves.items()}
        (found,) = torch.autograd.grad(operation(**alone), alone[name], torch.ones_like(y))
        assert torch.equal(found, expected), name


def test_results_repeat_bit_for_bit(operation):
    leaves = leaves_of(*draw((9, 4, 6, 7, 6)))
    grad = torch.randn(9, 6, 6, 7)
    assert all(map(torch.equal, results(operation, leaves, grad), results(operation, leaves, grad)))


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gelu_far_from_zero(approximate):
    x = torch.tensor([-4e5, -50.0, -14.0, 14.0, 50.0, 4e5, torch.nan])[None, None, None].requires_grad_()
    y = functional.pointwise_conv_gelu(x, torch.ones(1, 1, 1, 1), approximate=approximate)
    (grad,) = torch.autograd.grad(y.sum(), x)
    # Exactly 0 where PyTorch's are: all of a map may lie there.
    assert not torch.stack((y, grad))[..., :3].any()
    torch.testing.assert_close(y[..., 3:], x[..., 3:], equal_nan=True)
    torch.testing.assert_close(grad[..., 3:], x[..., 3:] / x[..., 3:], equal_nan=True)


def test_an_empty_batch(operation):
    leaves = leaves_of(*draw((0, 4, 3, 5, 6)))
    y, *grads = results(operation, leaves, torch.empty(0, 6, 3, 5))
    assert y.shape == (0, 6, 3, 5)
    assert all(torch.equal(grad, torch.zeros_like(x)) for x, grad in zip(leaves.values(), grads, strict=True))


def test_gradients_have_the_strides_of_weights():
    x, weight, bias = draw((5, 3, 4, 4, 6, (2, 2)))
    for format in (torch.contiguous_format, torch.channels_last):
        leaf = weight.detach().to(memory_format=format).requires_grad_()
        functional.patch_conv(x, leaf, bias).sum().backward()
        assert leaf.grad.stride() == leaf.stride()


def test_a_graph_has_the_same_results(operation):
    torch.compiler.reset()
    leaves = leaves_of(*draw((9, 4, 3, 5, 6)))
    grad = torch.randn(9, 6, 3, 5)
    graph = torch.compile(operation, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, results(operation, leaves, grad), results(graph, leaves, grad)))


def test_the_operator_keeps_what_it_promises():
    x, weight, bias = (tensor.requires_grad_() for tensor in draw((5, 3, 5, 4, 6, (2, 2))))
    torch.library.opcheck(torch.ops.fastconv.native_patch_conv, (x, weight, bias, "identity", True, True))
    x, weight, bias = (tensor.requires_grad_() for tensor in draw((5, 3, 5, 4, 6)))
    torch.library.opcheck(torch.ops.fastconv.native_patch_conv, (x, weight, bias, "tanh", False, True))


@pytest.mark.parametrize(
    ("sizes", "layout", "native"),
    [
        ((128, 128, 8, 8, 32), "contiguous", True),
        ((128, 128, 8, 8, 32), "channels_last", False),
        ((1024, 64, 2, 2, 64), "contiguous", False),
        ((1024, 64, 2, 2, 64), "batch_last", True),
        ((8, 64, 2, 2, 64), "contiguous", True),
        ((8, 384, 7, 7, 1536), "contiguous", False),
    ],
    ids=str,
)
def test_where_pointwise_convolution_is_native(sizes, layout, native):
    x, *parameters = draw(sizes)
    assert decisions.native_pointwise_conv_gelu(in_format(x, layout), Convolution(*parameters)) == native


@pytest.mark.parametrize(
    ("sizes", "native"),
    [
        ((128, 3, 32, 32, 32, (4, 4)), True),
        ((1, 3, 32, 32, 32, (4, 4)), False),
        ((8, 3, 64, 64, 8, (4, 4)), False),
        ((8, 256, 8, 8, 512, (2, 2)), False),
    ],
    ids=str,
)
def test_where_patches_are_native(sizes, native):
    x, *parameters = draw(sizes)
    assert decisions.native_patch_conv(x, Convolution(*parameters)) == native
