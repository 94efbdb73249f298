"""The C++ kernels of layer norm, and of depthwise convolution and layer norm, against float64."""

import cases
import pytest
import torch
from cases import assert_operation_accurate, results

import fastconv
from fastconv.accuracy import FORMATS, in_format
from fastconv.checking.inputs import Sizes
from fastconv.kernels.cpu import chunks, layer_norm, library
from fastconv.operations import functional

# images, channels, height, width, multiplier, kernel; a vector has 4, 8 or 16 images.
SHAPES = {
    "less than a vector": Sizes(3, 3, 8, 8, 4, (7, 7)),
    "a chunk": Sizes(16, 2, 4, 4, 4, (7, 7)),
    "chunks and a rest": Sizes(37, 3, 5, 7, 3, (7, 7)),
    "wide": Sizes(9, 2, 6, 19, 1, (3, 5)),
    "smaller than the kernel": Sizes(17, 5, 1, 2, 2, (5, 7)),
    "one pixel": Sizes(33, 4, 1, 1, 2, (7, 7)),
    "one image": Sizes(1, 3, 7, 3, 2, (5, 5)),
    "one channel": Sizes(5, 1, 3, 3, 1, (1, 1)),
    "many images of few pixels": Sizes(4100, 1, 1, 2, 2, (1, 3)),
}
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.parametrize("norm", ["tensor", "sample"])]
each_operation = pytest.mark.parametrize("operation", ["layer_norm", "depthwise_conv_layer_norm"])


@pytest.fixture(autouse=True)
def _three_slots(monkeypatch):
    library.load()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(chunks, "SLOT_ELEMENTS", 16)
    monkeypatch.setattr(layer_norm, "SLOT_ELEMENTS", 16)
    with fastconv.backend("native"):
        yield


def draw(operation, sizes=SHAPES["chunks and a rest"], layout="contiguous", bias=True):
    """The operation's tensors by their names, each with a gradient."""
    tensors = {
        name: x for name, x in cases.draw(operation, sizes, affine=False, bias=bias).items() if x is not None
    }
    tensors["x"] = in_format(tensors["x"], layout)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def call(operation, norm, tensors):
    return getattr(functional, operation)(**tensors, norm=norm)


@each_operation
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(operation, norm, name, layout):
    assert_operation_accurate(operation, SHAPES[name], layout, affine=False, norm=norm, samples=2)


@each_operation
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_without_bias_and_with_a_large_mean(operation, norm, mean):
    sizes = SHAPES["chunks and a rest"]
    assert_operation_accurate(operation, sizes, affine=False, bias=False, mean=mean, norm=norm)


@each_operation
def test_pieces_of_a_long_norm(operation, norm):
    for layout in ("contiguous", "batch_last"):
        sizes = Sizes(6, 23, 20, 20, 1, (3, 3))
        assert_operation_accurate(operation, sizes, layout, affine=False, norm=norm, samples=1)


@each_operation
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_values_near_the_ends_of_the_range(operation, norm, scale):
    leaves = draw(operation, bias=False)
    leaves["x"] = (leaves["x"].detach() * scale).requires_grad_()
    grad = torch.randn_like(call(operation, norm, leaves))
    found = results(lambda **tensors: call(operation, norm, tensors), leaves, grad)
    with fastconv.backend("reference"):
        wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
        right = results(lambda **tensors: call(operation, norm, tensors), wide, grad.double())
    for mine, exact in zip(found, right, strict=True):
        # Float32 ends near 1e-38: what is nearer to zero may be lost.
        assert (mine - exact).norm() <= 5e-6 * exact.norm() + 1e-37 * exact.numel()


@each_operation
@pytest.mark.parametrize("layout", ["contiguous", "batch_last"])
def test_each_gradient_by_itself(operation, norm, layout):
    leaves = draw(operation, layout=layout)
    y = call(operation, norm, leaves)
    grad = torch.randn_like(y)
    for name, expected in zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True):
        alone = {other: x.detach().requires_grad_(other == name) for other, x in leaves.items()}
        (found,) = torch.autograd.grad(call(operation, norm, alone), alone[name], grad)
        assert torch.equal(found, expected)


@each_operation
def test_images_do_not_depend_on_others_and_threads_do_not_change_values(operation, norm, monkeypatch):
    for layout in FORMATS:
        tensors = draw(operation, layout=layout)
        y = call(operation, norm, tensors)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 1)
            assert torch.equal(call(operation, norm, tensors), y)
        if norm == "sample":
            other = tensors["x"].detach().clone()
            other[1:] = torch.nan
            tensors["x"] = other
            assert torch.equal(call(operation, norm, tensors)[0], y[0])


@each_operation
def test_the_same_bits_twice(operation, norm):
    leaves = draw(operation)
    grad = torch.randn_like(call(operation, norm, leaves))
    first, second = (results(lambda **tensors: call(operation, norm, tensors), leaves, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("layout", FORMATS)
def test_equal_values_become_zeros(norm, layout):
    x = in_format(torch.full((5, 7, 11, 3), 0.1), layout)
    assert not functional.layer_norm(x, norm=norm, eps=1e-30).any()


@each_operation
def test_compiled(operation, norm):
    leaves = draw(operation)
    grad = torch.randn_like(call(operation, norm, leaves))

    def function(**tensors):
        return call(operation, norm, tensors)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, results(compiled, leaves, grad), results(function, leaves, grad)))
