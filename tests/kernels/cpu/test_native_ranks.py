"""The C++ kernels of norms that span ranks, which are threads of one process here."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import NORMED, draw, results
from oracle import assert_accurate

import fastconv
from fastconv.accuracy import in_format
from fastconv.checking.inputs import Sizes
from fastconv.kernels.common import ranks
from fastconv.kernels.common.registration import forget_plans
from fastconv.kernels.cpu import block, chunks, depthwise_layer_norm, layer_norm
from fastconv.operations import functional, reference

# channels, height, width, multiplier, kernel
MAP = 3, 5, 7, 3, (7, 7)
OPERATORS = {
    "convnext_block": block.convnext_block,
    "depthwise_conv_layer_norm": depthwise_layer_norm.depthwise_conv_layer_norm,
    "layer_norm": layer_norm.layer_norm,
}
pytestmark = pytest.mark.usefixtures("native", "poisoned")
each_operation = pytest.mark.parametrize("operation", NORMED)


class Ranks:
    """So many threads as the ranks of the group "threads", and the tensors that each has exchanged."""

    def __init__(self, count):
        self._barrier = threading.Barrier(count, timeout=60)
        self._here = threading.local()
        self._parts = [None] * count
        self.exchanged = [[] for _ in range(count)]

    def place_in(self, group):
        # An error in a thread that is no rank, as one of OpenMP's.
        return self._here.rank, len(self._parts)

    def all_reduce(self, x, group):
        assert group == "threads"
        assert not x.requires_grad
        rank = self._here.rank
        self.exchanged[rank].append(x)
        self._parts[rank] = x
        self._barrier.wait()
        total = sum(self._parts)
        self._barrier.wait()
        return total

    def run(self, function):
        """The results of `function(rank)` by each rank."""

        def act(rank):
            self._here.rank = rank
            try:
                return function(rank)
            except BaseException:
                # Those who wait for this rank go on, with an error.
                self._barrier.abort()
                raise

        self._barrier.reset()
        if len(self._parts) == 1:
            return [act(0)]
        with ThreadPoolExecutor(len(self._parts)) as threads:
            return list(threads.map(act, range(len(self._parts))))


@pytest.fixture
def start(monkeypatch):
    """Make the threads that are ranks from now on."""

    def make(count):
        made = Ranks(count)
        monkeypatch.setattr(ranks, "place_in", made.place_in)
        monkeypatch.setattr(ranks, "all_reduce", made.all_reduce)
        return made

    return make


@pytest.fixture(autouse=True)
def _three_slots(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(chunks, "SLOT_ELEMENTS", 16)
    monkeypatch.setattr(layer_norm, "SLOT_ELEMENTS", 16)


def draw_whole(operation, images, mean=0.0, affine=False):
    """The tensors of all ranks' images, and a gradient of the result."""
    tensors = {name: x for name, x in draw(operation, Sizes(images, *MAP), affine=affine).items() if x is not None}
    tensors["x"] = tensors["x"] + mean
    return tensors, 1 + torch.randn_like(getattr(reference, operation)(**tensors))


def call_parts(made, operation, tensors, grad, counts, layout="contiguous", backends=("native",)):
    """The value and gradients of a batch of which each rank has so many images, by one of the backends in turn."""
    images, grads = tensors["x"].split(counts), grad.split(counts)

    def call(**given):
        return getattr(functional, operation)(**given, process_group="threads")

    def of_rank(rank):
        own = tensors | {"x": in_format(images[rank], layout)}
        leaves = {name: x.detach().requires_grad_() for name, x in own.items()}
        with fastconv.backend(backends[rank % len(backends)]):
            return results(call, leaves, grads[rank])

    y, grad_x, *parameters = zip(*made.run(of_rank), strict=True)
    return [torch.cat(y), torch.cat(grad_x), *map(sum, parameters)]


def call_whole(operation, tensors, grad, dtype=torch.float32):
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in tensors.items()}
    return results(getattr(reference, operation), leaves, grad.to(dtype))


def assert_parts_are_the_whole(made, operation, counts, mean=0.0, **options):
    def sample():
        tensors, grad = draw_whole(operation, sum(counts), mean)
        mine = call_parts(made, operation, tensors, grad, counts, **options)
        low, exact = (call_whole(operation, tensors, grad, dtype) for dtype in (torch.float32, torch.float64))
        return dict(zip(["output", *tensors], zip(mine, low, exact, strict=True), strict=True))

    assert_accurate(sample, samples=2)


@each_operation
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_last"])
@pytest.mark.parametrize("counts", [(5, 37, 2), (0, 19, 3), (0, 0, 1), (4,)])
def test_parts_of_a_batch_are_the_whole(operation, layout, counts, start):
    assert_parts_are_the_whole(start(len(counts)), operation, counts, layout=layout)


@each_operation
def test_a_mean_that_is_large(operation, start):
    assert_parts_are_the_whole(start(2), operation, (5, 30), mean=1e4)


@each_operation
def test_ranks_may_run_other_implementations(operation, start):
    assert_parts_are_the_whole(start(4), operation, (5, 17, 0, 2), backends=("native", "portable"))


@each_operation
def test_means_of_ranks_that_differ(operation, start):
    tensors, grad = draw_whole(operation, 20)
    tensors["x"][:7] += 100
    mine = call_parts(start(2), operation, tensors, grad, (7, 13))
    for ours, exact in zip(mine, call_whole(operation, tensors, grad, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@each_operation
def test_the_numbers_that_are_exchanged(operation, start):
    tensors, grad = draw_whole(operation, 22, mean=3.0)
    forget_plans()
    found = {}
    for backend in ("native", "portable"):
        made = start(3)
        call_parts(made, operation, tensors, grad, (5, 17, 0), backends=(backend,))
        found[backend] = made.exchanged
    for native, portable in zip(found["native"], found["portable"], strict=True):
        # Once for each direction, whatever a new plan rehearses.
        assert [x.shape for x in native] == [(3, 3), (2,)]
        assert all(x.dtype == torch.float64 for x in native)
        for mine, other in zip(native, portable, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-3)
    assert not any(x.any() for x in found["native"][2])


@each_operation
def test_a_group_of_one_rank_changes_no_bit_of_the_forward(operation, start):
    tensors, _ = draw_whole(operation, 37)
    function = getattr(functional, operation)
    (mine,) = start(1).run(lambda _: function(**tensors, process_group="threads"))
    assert torch.equal(mine, function(**tensors))


@each_operation
def test_one_gradient_is_exchanged_as_all(operation, start):
    tensors, grad = draw_whole(operation, 6)
    made = start(1)

    def differentiate(name):
        leaves = {other: x.detach().requires_grad_(other == name) for other, x in tensors.items()}
        getattr(functional, operation)(**leaves, process_group="threads").backward(grad)

    for name in tensors:
        made.run(lambda _, name=name: differentiate(name))
    assert len(made.exchanged[0]) == 2 * len(tensors)


@each_operation
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("images", [6, 0])
def test_an_error_of_an_exchange_is_raised(operation, images, error, start, monkeypatch):
    tensors, grad = draw_whole(operation, images)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    made = start(1)

    def call(_):
        return getattr(functional, operation)(**leaves, process_group="threads")

    def fail(*_):
        raise error("a peer has died")

    (y,) = made.run(call)
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "all_reduce", fail)
        with pytest.raises(error, match="a peer has died"):
            made.run(call)
        with pytest.raises(error, match="a peer has died"):
            made.run(lambda _: y.backward(grad))
    assert torch.equal(made.run(call)[0], y)


@each_operation
@pytest.mark.parametrize("images", [6, 0])
def test_compiled(operation, images, start):
    tensors, grad = draw_whole(operation, images)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}

    def function(**tensors):
        return getattr(functional, operation)(**tensors, process_group="threads")

    made = start(1)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (mine,) = made.run(lambda _: results(compiled, leaves, grad))
    assert [x.shape for x in made.exchanged[0]] == [(3, 1), (2,)]
    assert all(map(torch.equal, mine, made.run(lambda _: results(function, leaves, grad))[0]))


@each_operation
def test_operators_keep_the_rules_of_pytorch(operation, start):
    tensors, _ = draw_whole(operation, 6)
    options = {"convnext_block": ("none", True)}.get(operation, ())
    arguments = *tensors.values(), "tensor", 1e-5, "threads", *options
    start(1).run(lambda _: torch.library.opcheck(OPERATORS[operation]._registered, arguments))
