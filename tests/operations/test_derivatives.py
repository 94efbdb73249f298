"""Every way of differentiating beyond the first derivative gives what the definition's operations give."""

import functools

import pytest
import torch
from cases import NORMED, draw
from torch import autograd, func
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import fastconv
from fastconv.checking.inputs import Sizes
from fastconv.operations import backends, functional, reference

each_operation = pytest.mark.parametrize(
    "operation",
    [*(f"{name}, {norm}" for name in NORMED for norm in functional.NORMS), "pointwise_conv_gelu", "patch_conv"],
)
# images, channels, height, width, multiplier, kernel: for each form of the portable path, and for norms of pixels
SIZES = {
    "batch last": Sizes(3, 5, 2, 3, 2, (3, 3)),
    "channels last": Sizes(2, 3, 5, 11, 2, (3, 3)),
    "one output a channel": Sizes(3, 5, 2, 3, 1, (3, 3)),
}


@pytest.fixture(
    params=[
        ("portable", "cpu"),
        ("native", "cpu"),
        pytest.param(("triton", "cpu"), marks=pytest.mark.interpreted),
        pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def device(request, nothing_small):
    """A backend is forced; this is where it computes."""
    backend, device = request.param
    with fastconv.backend(backend):
        if reason := backends.can_run(backend, torch.device(device), torch.float32):
            pytest.skip(reason)
        yield device


def of_tensors(operation, names, module):
    """An operation of a module as a function of tensors in the order of their names."""
    name, *norm = operation.split(", ")
    options = {"norm": norm[0]} if norm else {}

    def call(*tensors):
        return getattr(module, name)(**dict(zip(names, tensors, strict=True)), **options)

    return call


def draw_double(operation, sizes):
    """{name: tensor} of an operation's arguments, in float64."""
    if operation == "patch_conv":
        shapes = {"x": sizes[:4], "weight": (3, sizes.channels, 2, 3), "bias": (3,)}
        return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return draw(operation.split(", ")[0], sizes, dtype=torch.float64)


def grad_penalty(f, tensors, order=2):
    """Gradients of gradients, each of a sum of squares, `order` times."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    value = f(*leaves)
    for left in reversed(range(order)):
        loss = value.square().sum() if isinstance(value, torch.Tensor) else sum(x.square().sum() for x in value)
        value = autograd.grad(loss, leaves, create_graph=left > 0, materialize_grads=True)
    return value


def batched_gradients(f, tensors, create_graph=False):
    """Of two gradients at once; with a graph, the gradients of their sum of squares."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = f(*leaves)
    grads = torch.linspace(-1, 1, 2 * y.numel(), dtype=y.dtype, device=y.device).view(2, *y.shape)
    found = autograd.grad(y, leaves, grads, is_grads_batched=True, create_graph=create_graph)
    if not create_graph:
        return found
    return autograd.grad(sum(x.square().sum() for x in found), leaves, materialize_grads=True)


def forward_mode(f, tensors):
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(x, x.cos()) for x in tensors))
        return forward_ad.unpack_dual(y)


def scalar(f):
    return lambda *tensors: f(*tensors).square().sum()


def stacked(tensors):
    return tuple(torch.stack([x, 2 * x, x.sin()]) for x in tensors)


def every(tensors):
    return tuple(range(len(tensors)))


def a_few(f):
    return lambda *tensors: f(*tensors).flatten()[:3]


# name: called with a function of tensors, and tensors. What asks for more in the backward of kernels:
BACKWARD = {
    "penalty": grad_penalty,
    "is_grads_batched": batched_gradients,
    "is_grads_batched, recorded": functools.partial(batched_gradients, create_graph=True),
    "vectorized jacobian": lambda f, t: autograd.functional.jacobian(a_few(f), tuple(t), vectorize=True),
    "vectorized hessian": lambda f, t: autograd.functional.hessian(
        lambda x: scalar(f)(x, *t[1:]), t[0], vectorize=True
    ),
}
# And what asks from the start, when no kernel runs, whatever is forced:
TRANSFORMS = {
    "forward mode": forward_mode,
    "grad": lambda f, t: func.grad(scalar(f), every(t))(*t),
    "grad of grad": lambda f, t: func.grad(lambda x: scalar(func.grad(scalar(f)))(x, *t[1:]))(t[0]),
    "vjp": lambda f, t: func.vjp(f, *t)[1](f(*t).cos()),
    "jvp": lambda f, t: func.jvp(f, tuple(t), tuple(x.cos() for x in t)),
    "vmap": lambda f, t: func.vmap(f)(*stacked(t)),
    "vmap of some": lambda f, t: func.vmap(f, (0, *[None] * (len(t) - 1)))(stacked(t)[0], *t[1:]),
    "per-sample gradients": lambda f, t: func.vmap(
        func.grad(lambda x, *others: scalar(f)(x[None], *others), every(t)), (0, *[None] * (len(t) - 1))
    )(*t),
    "jacrev": lambda f, t: func.jacrev(a_few(f), every(t))(*t),
    "jacfwd": lambda f, t: func.jacfwd(a_few(f), every(t))(*t),
    "hessian": lambda f, t: func.hessian(lambda x: scalar(f)(x, *t[1:]))(t[0]),
}


def assert_like_the_definition(way, operation, device):
    """In float32, compared with the definition in float64."""
    tensors = draw_double(operation, SIZES["batch last"])
    expected = way(of_tensors(operation, tensors, reference), list(tensors.values()))
    singles = [x.float().to(device) for x in tensors.values()]
    found = way(of_tensors(operation, tensors, functional), singles)
    for ours, exact in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert (ours.cpu().double() - exact).norm() <= 1e-4 * exact.norm() + 1e-5


@pytest.mark.parametrize("way", BACKWARD)
@each_operation
def test_a_backward_that_is_asked_for_more(operation, way, device):
    assert_like_the_definition(BACKWARD[way], operation, device)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("way", TRANSFORMS)
@each_operation
def test_a_transform(operation, way):
    with fastconv.backend("portable"):
        assert_like_the_definition(TRANSFORMS[way], operation, "cpu")


# Not of norms: in PyTorch 2.14 the third derivative of F.layer_norm itself fails gradgradcheck.
@pytest.mark.parametrize("operation", ["pointwise_conv_gelu", "patch_conv"])
def test_third_derivatives(operation, device):
    assert_like_the_definition(functools.partial(grad_penalty, order=3), operation, device)


@pytest.mark.parametrize("sizes", SIZES)
@each_operation
def test_gradients_of_gradients(operation, sizes, nothing_small):
    """On the portable path, against difference quotients."""
    leaves = {key: x.requires_grad_() for key, x in draw_double(operation, SIZES[sizes]).items()}
    function = of_tensors(operation, leaves, functional)
    with fastconv.backend("portable"):
        assert autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)
