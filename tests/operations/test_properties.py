"""What every operation keeps, whichever backend runs it: layouts, and what each gradient depends on."""

import functools
import importlib.util

import pytest
import torch
from cases import NORMED, SHAPES, draw_leaves
from fuzzing.arguments import LAYOUTS
from oracle import assert_accurate

import fastconv
from fastconv.accuracy import FORMATS, compare, in_format
from fastconv.checking.inputs import Input, Sizes
from fastconv.checking.problems import operation_problem
from fastconv.operations import backends, functional

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# The portable path has two forms of the convolution. The interpreter is slow.
pytestmark = pytest.mark.parametrize(
    ("backend", "device", "sizes"),
    [
        pytest.param("portable", "cpu", SHAPES["lecture 8x8"], id="portable, batch last"),
        pytest.param("portable", "cpu", SHAPES["odd and prime"], id="portable, channels last"),
        pytest.param("native", "cpu", SHAPES["lecture 8x8"], id="native, whole vectors"),
        pytest.param("native", "cpu", SHAPES["odd and prime"], id="native, parts of vectors"),
        pytest.param(
            "triton",
            "cpu",
            Sizes(2, 3, 2, 3, 2, (3, 3)),
            id="interpreted",
            marks=[pytest.mark.interpreted, NEEDS_TRITON],
        ),
        pytest.param("triton", "cuda", SHAPES["lecture 8x8"], id="cuda", marks=pytest.mark.gpu),
    ],
)
OPERATIONS = [
    *(f"{name}, {norm}" for name in NORMED for norm in functional.NORMS),
    "pointwise_conv_gelu",
    "patch_conv",
]
each_operation = pytest.mark.parametrize("operation", OPERATIONS[:-1])


@pytest.fixture(autouse=True)
def _backend(backend, nothing_small):
    if backend == "native" and (reason := backends.can_run(backend, torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    with fastconv.backend(backend):
        yield


@pytest.fixture
def call(operation):
    """The operation, with its norm, as a function of its tensors by their names."""
    name, *norm = operation.split(", ")
    return functools.partial(getattr(functional, name), **({"norm": norm[0]} if norm else {}))


@pytest.fixture
def leaves(operation, sizes, device):
    return draw_leaves(operation.split(", ")[0], sizes, device)


def gradients(y, leaves, grad, **options):
    return torch.autograd.grad(y, list(leaves.values()), grad, **options)


# Those of dimensions of one element are arbitrary.
def strides(x):
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


VIEWS = {**LAYOUTS, "channels_last, sliced": lambda x: in_format(x, "channels_last")[:, :, 1:, 1:]}


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_and_gradients_have_the_strides_of_pytorchs(call, leaves, weights, backend, device):
    x = leaves.pop("x").detach()
    for name, parameter in leaves.items():
        if parameter.dim() == 4:
            leaves[name] = parameter.detach().to(memory_format=weights).requires_grad_()
    # The interpreter is slow.
    for name in VIEWS if backend != "triton" else ("contiguous", "channels_last"):
        found = []
        for each in (backend, "reference"):
            maps = VIEWS[name](x).detach().requires_grad_()
            with fastconv.backend(each):
                y = call(maps, **leaves)
                (grad,) = torch.autograd.grad(y.square().sum(), maps)
                with torch.no_grad():
                    results = [y, call(maps, **leaves)]
            # On a GPU the gradient of a depthwise convolution is up to the library.
            found.append([strides(each) for each in (results if device == "cuda" else [*results, grad])])
        assert found[0] == found[1], name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@each_operation
def test_gradients_of_weights_have_the_strides_of_the_weights(call, leaves, layout):
    for name, x in leaves.items():
        if x.dim() == 4 and name != "x":
            leaves[name] = x.detach().to(memory_format=layout).requires_grad_()
    call(**leaves).sum().backward()
    assert {name: x.grad.stride() for name, x in leaves.items() if name != "x"} == {
        name: x.stride() for name, x in leaves.items() if name != "x"
    }


@pytest.mark.parametrize("operation", [f"{name}, {norm}" for name in NORMED for norm in functional.NORMS])
def test_gradients_of_norms_are_not_rounded_by_autocast(operation, call, leaves, device, backend):
    if backend == "native":
        pytest.skip("under autocast portable runs")
    with torch.autocast(device, torch.bfloat16):
        y = call(**leaves)
    grad = torch.randn(y.shape, device=device).bfloat16().to(y.dtype)
    found = torch.autograd.grad(y, leaves["norm_bias"], grad)[0]
    assert found.dtype == torch.float32
    if not operation.startswith("convnext_block"):
        torch.testing.assert_close(found, grad.double().sum((0, 2, 3)).float())
    # Numbers that were rounded to bfloat16 stay the same if it is done again.
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize(
    ("dtype", "norm_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("operation", [f"{name}, {norm}" for name in NORMED for norm in functional.NORMS])
def test_norm_parameters_of_another_dtype(operation, backend, device, sizes, dtype, norm_dtype):
    if backend == "native" and dtype != torch.float32:
        pytest.skip("its kernels take float32 only")
    name, norm = operation.split(", ")
    gradients = {}

    def mixed(function):
        def call(*values):
            tensors = dict(zip(names, values, strict=True))
            for each in ("norm_weight", "norm_bias"):
                # What is exact stays float64.
                if tensors["x"].dtype == dtype:
                    tensors[each] = tensors[each].to(norm_dtype)
                    tensors[each].register_hook(lambda grad: gradients.setdefault(grad.dtype))
            y = function(*tensors.values())
            assert y.dtype == tensors["x"].dtype
            return y

        return call

    names = []

    def sample():
        ours, definition, tensors = operation_problem(name, Input(sizes, affine=True), {"norm": norm})
        names[:] = tensors
        return compare(mixed(ours), mixed(definition), tensors.values(), names, dtype=dtype, device=device)

    assert_accurate(sample, dtype, samples=4)
    assert gradients.keys() == {norm_dtype}


@each_operation
def test_expanded_gradient(call, leaves, device):
    y = call(**leaves)
    # The gradient of a sum has strides of 0.
    for weights in (torch.randn(y.shape[1], device=device)[:, None, None], torch.ones((), device=device)):
        expanded = weights.expand(y.shape)
        dense = gradients(y, leaves, expanded.clone(), retain_graph=True)
        torch.testing.assert_close(gradients(y, leaves, expanded, retain_graph=True), dense)


@each_operation
def test_imaginary_parts_of_conjugates(call, leaves, device):
    """PyTorch negates them only when it reads them."""

    def imaginary(x):
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    x = leaves.pop("x").detach()
    assert imaginary(x).is_neg()
    y = call(x, **leaves)
    grad = torch.randn(y.shape, device=device)
    torch.testing.assert_close(call(imaginary(x), **leaves), y)
    expected = gradients(y, leaves, grad, retain_graph=True)
    torch.testing.assert_close(gradients(y, leaves, imaginary(grad)), expected)


# That of the norm of each pixel is in tests/kernels/test_stencil.py.
@pytest.mark.parametrize("operation", ["convnext_block, tensor", "pointwise_conv_gelu"])
def test_each_gradient_by_itself(call, leaves, device):
    y = call(**leaves)
    grad = torch.randn(y.shape, device=device)
    for name, expected in zip(leaves, gradients(y, leaves, grad), strict=True):
        alone = {other: x.detach().requires_grad_(other == name) for other, x in leaves.items()}
        (found,) = torch.autograd.grad(call(**alone), alone[name], grad)
        torch.testing.assert_close(found, expected)


@each_operation
def test_results_repeat_bit_for_bit_and_leave_the_gradient_alone(call, leaves, device):
    results = [call(**leaves) for _ in range(2)]
    grad = torch.randn(results[0].shape, device=device)
    before = grad.clone()
    first, second, again = ([y, *gradients(y, leaves, grad, retain_graph=True)] for y in (*results, results[0]))
    assert torch.equal(grad, before)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, again, strict=True))


# The portable path has a form for small maps of its own.
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("side", [1, 4])
@each_operation
def test_empty_batch_of_small_maps(operation, call, sizes, device, multiplier, side):
    sizes = sizes._replace(images=0, height=side, width=side, multiplier=multiplier)
    leaves = draw_leaves(operation.split(", ")[0], sizes, device)
    y = call(**leaves)
    assert y.shape[0] == 0
    for x, grad in zip(leaves.values(), gradients(y.sum(), leaves, None), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@each_operation
def test_empty_batch(call, leaves):
    channels = call(**leaves).shape[1]
    leaves["x"] = leaves["x"][:0].detach().requires_grad_()
    y = call(**leaves)
    assert y.shape == (0, channels, *leaves["x"].shape[2:])
    for x, grad in zip(leaves.values(), gradients(y.sum(), leaves, None), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("operation", "layout"),
    [
        *((f"{name}, tensor", layout) for name in NORMED for layout in FORMATS),
        *((f"{name}, channel", layout) for name in NORMED for layout in ("contiguous", "channels_last")),
    ],
)
def test_results_may_be_changed_in_place(call, leaves, layout):
    x = in_format(leaves.pop("x"), layout)
    grads = [
        torch.autograd.grad(change(call(x, **leaves)).square().sum(), x)[0] for change in (torch.relu_, torch.relu)
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_operation
def test_without_gradients_the_values_are_the_same(call, leaves, mode):
    expected = call(**leaves)
    with mode():
        y = call(**leaves)
    assert not y.requires_grad
    assert torch.equal(y, expected)
