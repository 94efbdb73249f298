"""Every way of differentiating beyond the first derivative gives what the definition's operations give."""

import pytest
import torch
from cases import NORMED, draw_leaves
from torch import autograd, func
from torch.autograd import forward_ad

import fastconv
from fastconv.checking.inputs import Sizes
from fastconv.operations import backends, functional, reference

OPERATIONS = [*(f"{name}, {norm}" for name in NORMED for norm in functional.NORMS), "pointwise_conv_gelu"]
OPERATIONS.append("patch_conv")
each_operation = pytest.mark.parametrize("operation", OPERATIONS)
# images, channels, height, width, multiplier, kernel: for each form of the portable path, and for norms of pixels
SIZES = {
    "batch last": Sizes(3, 5, 2, 3, 2, (3, 3)),
    "channels last": Sizes(2, 3, 5, 11, 2, (3, 3)),
    "one output a channel": Sizes(3, 5, 2, 3, 1, (3, 3)),
}


@pytest.fixture(params=["portable", "native", pytest.param("triton", marks=pytest.mark.interpreted)])
def backend(request, nothing_small):
    with fastconv.backend(request.param):
        if reason := backends.can_run(request.param, torch.device("cpu"), torch.float32):
            pytest.skip(reason)
        yield


def of_tensors(operation, names, module):
    """An operation of a module as a function of tensors in the order of their names."""
    name, *norm = operation.split(", ")
    options = {"norm": norm[0]} if norm else {}

    def call(*tensors):
        return getattr(module, name)(**dict(zip(names, tensors, strict=True)), **options)

    return call


def draw_some(operation, sizes, dtype=torch.float64):
    name = operation.split(", ")[0]
    if name == "patch_conv":
        _, channels, *_ = sizes[:4]
        x, weight, bias = torch.randn(sizes[:4]), torch.randn(3, channels, 2, 3), torch.randn(3)
        return {"x": x.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype)}
    return {key: x.detach() for key, x in draw_leaves(name, sizes, dtype=dtype).items()}


def grad_penalty(f, tensors, order=2):
    """Gradients of gradients, each of a sum of squares, `order` times."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    value = f(*leaves)
    for left in reversed(range(order)):
        loss = value.square().sum() if isinstance(value, torch.Tensor) else sum(x.square().sum() for x in value)
        value = autograd.grad(loss, leaves, create_graph=left > 0, materialize_grads=True)
    return value


def batched_gradients(f, tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = f(*leaves)
    grads = torch.linspace(-1, 1, 2 * y.numel(), dtype=y.dtype).view(2, *y.shape)
    return autograd.grad(y, leaves, grads, is_grads_batched=True)


def batched_and_recorded(f, tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = f(*leaves)
    grads = torch.linspace(-1, 1, 2 * y.numel(), dtype=y.dtype).view(2, *y.shape)
    found = autograd.grad(y, leaves, grads, is_grads_batched=True, create_graph=True)
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


# name: called with a function of tensors, and tensors
WAYS = {
    "penalty": grad_penalty,
    "is_grads_batched": batched_gradients,
    "is_grads_batched, recorded": batched_and_recorded,
    "vectorized jacobian": lambda f, t: autograd.functional.jacobian(a_few(f), tuple(t), vectorize=True),
    "vectorized hessian": lambda f, t: autograd.functional.hessian(
        lambda x: scalar(f)(x, *t[1:]), t[0], vectorize=True
    ),
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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@each_operation
def test_a_way_of_differentiating(operation, way, backend):
    tensors = draw_some(operation, SIZES["batch last"])
    expected = WAYS[way](of_tensors(operation, tensors, reference), list(tensors.values()))
    singles = [x.float() for x in tensors.values()]
    found = WAYS[way](of_tensors(operation, tensors, functional), singles)
    compare_all(found, expected)


def compare_all(found, expected):
    for ours, exact in zip(leaves_of(found), leaves_of(expected), strict=True):
        if exact is not None:
            assert (ours.double() - exact).norm() <= 1e-4 * exact.norm() + 1e-5


def leaves_of(results):
    return torch.utils._pytree.tree_leaves(results)


# Not of norms: in PyTorch 2.14 the third derivative of F.layer_norm itself fails gradgradcheck.
@pytest.mark.parametrize("operation", ["pointwise_conv_gelu", "patch_conv"])
def test_third_derivatives(operation, backend):
    tensors = draw_some(operation, SIZES["batch last"])
    expected = grad_penalty(of_tensors(operation, tensors, reference), list(tensors.values()), order=3)
    singles = [x.float() for x in tensors.values()]
    compare_all(grad_penalty(of_tensors(operation, tensors, functional), singles, order=3), expected)


@pytest.mark.parametrize("sizes", SIZES)
@each_operation
def test_gradients_of_gradients(operation, sizes, nothing_small):
    """On the portable path, against difference quotients."""
    leaves = {key: x.requires_grad_() for key, x in draw_some(operation, SIZES[sizes]).items()}
    function = of_tensors(operation, leaves, functional)
    with fastconv.backend("portable"):
        assert autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)
