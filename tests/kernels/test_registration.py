"""Operators called eagerly: plans by layout, the backward's kernels first, and who else gets to see them."""

import collections
import pickle
import typing

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv.kernels.common.errors import KernelError

pytest.importorskip("triton")
from fastconv.kernels.common import registration
from fastconv.kernels.common.registration import DifferentiableOperator, Operator

pytestmark = pytest.mark.interpreted


class Inputs(typing.NamedTuple):
    x: torch.Tensor
    factor: float


class Scaled:
    """x * factor by a plan that counts itself."""

    made: typing.ClassVar = collections.Counter()

    def __init__(self, inputs):
        x, factor = inputs
        assert x.is_meta
        self.made[x.shape, x.stride(), x.dtype, factor] += 1

    def __call__(self, inputs):
        if inputs.x.is_meta and inputs.factor == 13:
            raise KernelError("thirteen", "no luck")
        return inputs.x * inputs.factor


def fake(inputs: Inputs) -> torch.Tensor:
    return torch.empty_like(inputs.x)


def definition(inputs):
    return inputs.x * inputs.factor


def gradients(forward, grad):
    factor = forward.inputs.factor
    return {"x": scaled_backward(Inputs(grad, 13.0 if factor == 7 else factor), forward)}


scaled_backward = Operator("fastconv_test::scaled_backward", Inputs, Scaled, fake)
scaled = DifferentiableOperator("fastconv_test::scaled", Inputs, Scaled, fake, definition, gradients)


@pytest.fixture(autouse=True)
def _no_plans():
    registration.forget_plans()
    Scaled.made.clear()


def test_a_plan_is_made_once_for_a_layout():
    x = torch.randn(4, 6)
    for y in (x, torch.randn(4, 6), x.t().contiguous().t(), x[:, ::2], x.double(), x[:2]):
        for _ in range(2):
            assert torch.equal(scaled(y, 3.0), 3.0 * y)
    assert len(Scaled.made) == 5
    assert set(Scaled.made.values()) == {1}
    scaled(x, 4.0)
    assert len(Scaled.made) == 6


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(registration, "MOST_PLANS", 3)
    for rows in (1, 2, 3, 4, 1, 4):
        scaled(torch.ones(rows), 2.0)
    made = {shape[0]: count for (shape, *_), count in Scaled.made.items()}
    # The oldest went for the fourth.
    assert made == {1: 2, 2: 1, 3: 1, 4: 1}


def test_gradients_and_gradients_of_other_strides():
    x = torch.randn(3, 5, requires_grad=True)
    y = scaled(x, 3.0)
    assert torch.equal(y, 3 * x)
    for grad in (torch.randn(3, 5), torch.randn(5, 3).t(), torch.ones(1).expand(3, 5)):
        (found,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        assert torch.equal(found, 3 * grad)


def test_gradients_that_are_recorded_or_batched_are_the_definitions():
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled(x, 3.0), x, x.square(), create_graph=True)
    assert torch.equal(torch.autograd.grad(grad.sum(), x)[0], 6 * x)
    (grads,) = torch.autograd.grad(scaled(x, 3.0), x, torch.eye(3), is_grads_batched=True)
    assert torch.equal(grads, 3 * torch.eye(3))
    # None of them by the kernels of the backward.
    assert set(Scaled.made) == {((3,), (1,), torch.float32, 3.0)}


def test_a_forward_does_not_run_without_a_backward_that_can():
    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        with pytest.raises(KernelError, match=r"kernel thirteen cannot run on this GPU: no luck; .*portable"):
            scaled(x, 7.0)
    # Both plans are made once, though each call asks for them.
    assert set(Scaled.made.values()) == {1}
    # Nothing is wrong with the forward.
    with torch.no_grad():
        assert torch.equal(scaled(x, 7.0), torch.full((3,), 7.0))


def test_a_kernel_that_cannot_run_is_named_at_each_call():
    for _ in range(2):
        with pytest.raises(KernelError) as raised:
            scaled(torch.ones(2), 13.0)
        assert (raised.value.kernel, raised.value.reason) == ("thirteen", "no luck")
    assert set(Scaled.made.values()) == {1}


def test_the_error_of_a_kernel_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(KernelError("stencil", "too large")))
    assert (error.kernel, error.reason) == ("stencil", "too large")
    assert str(error).startswith("Triton kernel stencil cannot run on this GPU: too large; use")


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operators():
    x = torch.randn(3, requires_grad=True)
    with Seen() as seen:
        scaled(x, 3.0).sum().backward()
    assert "fastconv_test::scaled" in seen.names
    assert "fastconv_test::scaled_backward" in seen.names


def test_compilers_see_the_operator():
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    x = torch.randn(3)
    assert torch.equal(torch.compile(lambda x: scaled(x, 3.0), backend=backend, fullgraph=True)(x), 3 * x)
    assert any("fastconv_test.scaled" in target for target in graphs[0])


def test_subclasses_of_tensors_see_the_operators():
    seen = []

    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    y = scaled(torch.ones(3).as_subclass(Wrapped), 3.0)
    assert isinstance(y, Wrapped)
    assert any("fastconv_test.scaled" in name for name in seen)
    assert torch.equal(scaled(torch.nn.Parameter(torch.ones(3)), 3.0), torch.full((3,), 3.0))


def test_the_node_of_the_graph_has_the_name_of_the_operator():
    assert scaled(torch.ones(2, requires_grad=True), 1.0).grad_fn.name() == "scaledBackward"
