"""What a call of a kernel may meet: hooks, devices, threads, sizes; and that C++ takes the arguments of Python."""

import re
from concurrent.futures import ThreadPoolExecutor

import builds
import pytest
import torch
from cases import draw, results

import fastconv
from fastconv.accuracy import in_format
from fastconv.kernels.common.values import Norm
from fastconv.kernels.cpu import block, chunks, depthwise_layer_norm, layer_norm, library, patches
from fastconv.operations import functional, native, portable

OPERATIONS = "convnext_block", "depthwise_conv_layer_norm", "layer_norm", "pointwise_conv_gelu"
STRUCTURES = block, depthwise_layer_norm, layer_norm, patches
TYPES = {"c_int": "int", "c_double": "double", "c_void_p": "*"}

pytestmark = pytest.mark.usefixtures("native")


def fields_in_sources(name):
    """(type, name) of each field of a structure in C++, where every pointer is "*"."""
    text = "".join(path.read_text() for path in library.SOURCES.glob("*.cpp"))
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)[1]
    for declaration in re.sub("//.*", "", body).split(";"):
        kind = "*" if "*" in declaration else declaration.strip().partition(" ")[0]
        yield from ((kind, name) for name in re.findall(r"(\w+)(?=,|$)", declaration))


@pytest.mark.parametrize("structure", [chunks._Transposition, *(module._Arguments for module in STRUCTURES)])
def test_arguments_are_those_of_the_sources(structure):
    ours = [(TYPES[kind.__name__], name) for name, kind in structure._fields_]
    assert ours == list(fields_in_sources(structure.__name__))


def prepare(operation, layout="contiguous"):
    """A function that returns the operation's value and its gradients, the same for each call."""
    tensors = {name: x for name, x in draw(operation, builds.SIZES[0], affine=False).items() if x is not None}
    tensors["x"] = in_format(tensors["x"], layout)
    function = getattr(functional, operation)
    grad = torch.randn_like(function(**tensors))
    return lambda: results(function, {name: x.detach().requires_grad_() for name, x in tensors.items()}, grad)


def moved(x):
    """A contiguous copy of a tensor, at an address that no vector may have."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("layout", ["contiguous", "batch_last"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_hooks_may_move_saved_tensors(operation, layout):
    call = prepare(operation, layout)
    expected = call()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, moved):
        assert all(map(torch.equal, call(), expected))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_several_threads_call_at_once(operation):
    call = prepare(operation)
    expected = call()

    def repeat(_):
        with fastconv.backend("native"):
            return all(all(map(torch.equal, call(), expected)) for _ in range(10))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(repeat, range(4)))


def test_a_default_device_is_not_that_of_the_maps():
    x = torch.randn(5, 3, 4, 4)
    expected = functional.layer_norm(x)
    with torch.device("meta"):
        assert torch.equal(functional.layer_norm(x), expected)


@pytest.mark.parametrize("scale", [0.3, 0.7, 1.9])
def test_equal_values_have_no_variance_below_zero(scale):
    for value in (0.1, 0.3, 0.7, 1.1, 3.3, 1000.1):
        x, weight = torch.full((3, 1, 3, 3), value), torch.full((1, 1, 1, 1), scale)
        assert functional.depthwise_conv_layer_norm(x, weight, eps=1e-30).isfinite().all()


def test_equal_values_far_from_zero_have_no_gradient():
    x = torch.full((1, 1, 3, 3), 1e25, requires_grad=True)
    (grad,) = torch.autograd.grad(functional.layer_norm(x, eps=1e-30).sum(), x)
    assert not grad.any()


def test_more_elements_than_the_kernels_count(monkeypatch):
    x = torch.ones(()).expand(2**31, 1, 1, 1)
    monkeypatch.setattr(portable, "layer_norm", lambda x, norm: "portable")
    assert native.layer_norm(x, Norm("tensor", 1e-5, None, None)) == "portable"
