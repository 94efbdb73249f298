"""What each of several processes does: `python together.py FUNCTION`, with the variables that torchrun sets.

And DEVICE, if it is not a CPU: several processes share one GPU.
"""

import copy
import os
import pickle
import signal
import sys
from functools import partial
from pathlib import Path

import interpreter
import pytest
import torch
from cases import draw
from oracle import assert_accurate
from synthetic import CPU, Recorder, make_set
from torch import distributed
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint as recomputed

import fastconv
from fastconv import functional, reference, set_process_group
from fastconv.checking.divergence import move_to_neighbours
from fastconv.checking.inputs import Sizes
from fastconv.training import checkpoint, loop, ranks
from fastconv.training.data import Dataset
from fastconv.training.recipe import Recipe

NORMED = ("convnext_block", "depthwise_conv_layer_norm", "layer_norm")
# images, channels, height, width, multiplier, kernel. The parts of the first are unequal, one of the second is
# empty, and the last has large maps.
SIZES = Sizes(5, 2, 4, 4, 4, (7, 7)), Sizes(1, 3, 3, 2, 2, (3, 3)), Sizes(3, 2, 19, 17, 1, (3, 3))


def part(x):
    """This process's images of all."""
    count, rank, ranks = len(x), distributed.get_rank(), distributed.get_world_size()
    return x[count * rank // ranks : count * (rank + 1) // ranks]


def results(call, tensors, grad, summed=lambda x: x):
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in tensors.items()}
    y = call(**leaves)
    y.backward(grad)
    grads = {name: x.grad for name, x in leaves.items() if x is not None}
    return {"y": y.detach(), "x": grads.pop("x")} | {name: summed(x) for name, x in grads.items()}


def sum_over_ranks(x):
    distributed.all_reduce(x)
    return x


def compared(operation, sizes, offset, call):
    """{name: (ours, PyTorch's, exact)}, of this process's images, and of the parameters of all processes."""
    torch.manual_seed(0)
    tensors = draw(operation, sizes, device=PLACE)
    tensors["x"] = tensors["x"] + offset
    define = getattr(reference, operation)
    grad = torch.randn_like(define(**tensors))
    mine = results(call, tensors | {"x": part(tensors["x"])}, part(grad), sum_over_ranks)
    doubles = {name: None if x is None else x.double() for name, x in tensors.items()}
    pytorch, exact = results(define, tensors, grad), results(define, doubles, grad.double())
    whole = {name: (mine[name], part(pytorch[name]), part(exact[name])) for name in ("y", "x")}
    whole = {name: values for name, values in whole.items() if values[2].numel()}
    return whole | {name: (mine[name], pytorch[name], exact[name]) for name in mine if name not in ("y", "x")}


def operations():
    """Parts of a batch have the results and gradients of the whole one, by every implementation."""
    world, rank = distributed.group.WORLD, distributed.get_rank()
    kernels = ["triton", "portable", *(["native"] if PLACE.type == "cpu" else [])]
    for operation in NORMED:
        call = partial(getattr(functional, operation), process_group=world)
        for backend in ("reference", *kernels):
            for sizes in SIZES:
                for offset in (0, 300):
                    print(operation, backend, sizes, offset, file=sys.stderr)
                    with fastconv.backend(backend):
                        assert_accurate(partial(compared, operation, sizes, offset, call), samples=1)
        for first, backend in enumerate(kernels):
            # Each process may take what suits its part.
            print(operation, "mixed", kernels[first:], file=sys.stderr)
            with fastconv.backend(kernels[(first + rank) % len(kernels)]):
                assert_accurate(partial(compared, operation, SIZES[0], 0, call), samples=1)
            print(operation, backend, "compiled", file=sys.stderr)
            with fastconv.backend(backend):
                compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
                assert_accurate(partial(compared, operation, SIZES[0], 0, compiled), samples=1)
                torch.compiler.reset()


def derivatives():
    """Gradient penalties over parts of a batch are those over the whole one; so are derivatives of torch.func."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randn(8, 1, 3, 3, dtype=torch.float64)
    x = x + 3

    def penalty(images, weight, group):
        images = images.clone().requires_grad_()
        y = functional.depthwise_conv_layer_norm(images, weight, process_group=group)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), images, create_graph=True)
        return grad.square().sum()

    def loss(images, weight, group):
        return functional.depthwise_conv_layer_norm(images, weight, process_group=group).pow(3).sum()

    name = distributed.group.WORLD.group_name
    weight.requires_grad_()
    for backend in ("reference", "portable"):
        with fastconv.backend(backend):
            (mine,) = torch.autograd.grad(penalty(part(x), weight, name), weight)
            (whole,) = torch.autograd.grad(penalty(x, weight, None), weight)
            torch.testing.assert_close(sum_over_ranks(mine), whole)
    weight = weight.detach()
    mine = torch.func.grad(loss, argnums=1)(part(x), weight, name)
    torch.testing.assert_close(sum_over_ranks(mine), torch.func.grad(loss, argnums=1)(x, weight, None))
    tangent = torch.randn_like(x)
    _, mine = torch.func.jvp(partial(loss, weight=weight, group=name), (part(x),), (part(tangent),))
    _, whole = torch.func.jvp(partial(loss, weight=weight, group=None), (x,), (tangent,))
    torch.testing.assert_close(sum_over_ranks(mine), whole)


def messages():
    """A step sends one message for each norm "tensor" and direction, and one with all gradients."""
    for norm, expected in (("tensor", 2 * (2 + 2) + 1), ("sample", 1)):
        recipe = Recipe(batch_size=13, width=4, depth=1, patch=2, norm=norm)
        state = loop.prepare(recipe, make_dataset(), PLACE, None, JOINED)
        size, *_ = state.rest_of_epoch()
        state.train(size)
        with profile() as profiled:
            state.train(size)
        assert sum(event.name == "c10d::allreduce_" for event in profiled.events()) == expected


def modules():
    """A classifier over ranks: copied, with a part that is called, recomputed, and without other ranks again."""
    torch.manual_seed(0)
    whole = fastconv.Classifier(4, 1, 2).to(PLACE)
    x = torch.rand(5, 3, 8, 8, device=PLACE)
    expected = part(whole(x))
    model = copy.deepcopy(whole)
    assert set_process_group(model, distributed.group.WORLD) == ["", "conv_block_1.0", "conv_block_2.0"]
    called = copy.deepcopy(model)
    called.conv_block_1[0].conv2.register_forward_hook(lambda *_: None)
    for each in (
        model,
        pickle.loads(pickle.dumps(model)),
        called,
        partial(recomputed, model, use_reentrant=False),
    ):
        torch.testing.assert_close(each(part(x)), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(part(x)), expected, rtol=1e-4, atol=1e-5)
    assert set_process_group(model, None) == []
    assert not torch.allclose(model(part(x)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="there is no process group 'another' in this process"):
        functional.layer_norm(x, process_group="another")


def agreement():
    """What the first process makes all have, and all find the same fault."""
    rank = distributed.get_rank()
    assert JOINED.share(lambda: {"made by": rank}) == {"made by": 0}
    with pytest.raises(
        OSError if JOINED.is_first else ranks.RankFailed, match="full" if JOINED.is_first else None
    ):
        JOINED.share(partial(fail, OSError("full")))
    with pytest.raises(
        ValueError, match="rank 1 has another lr than rank 0: 2, expected 1; start every rank alike"
    ):
        JOINED.check_alike(width=3, lr=1 + rank)
    assert JOINED.largest(rank, 5 - rank) == (JOINED.count - 1, 5)
    assert [range(5)[ranks.Ranks(i, 3).part(5)] for i in range(3)] == [range(1), range(1, 3), range(3, 5)]


def fail(error):
    raise error


def numbers():
    """All that concerns single operations."""
    if PLACE.type == "cpu":
        # Before any kernel is imported.
        interpreter.install()
    operations()
    derivatives()
    messages()
    modules()
    agreement()


def make_dataset():
    generator = torch.Generator().manual_seed(0)
    return Dataset(make_set(100, generator), make_set(33, generator), ("red", "green", "blue"), "synthetic")


def train(recipe, folder, mine=ranks.ALONE, device=CPU, stop=None, neighbour=False):
    """Train by a recipe, from the folder's checkpoint if there is one, and return the losses of all steps.

    Args:
        stop: (epoch, step) after which SIGTERM comes to the last process.
        neighbour: begin with weights that are moved to neighbouring floats.
    """
    path = folder / "checkpoint.pt"
    resumed = mine.share(lambda: checkpoint.load(path) if path.exists() else None)
    is_last = mine.rank == mine.count - 1
    observer = Recorder(stop, stop and (lambda: os.kill(os.getpid(), signal.SIGTERM) if is_last else None))
    state = loop.prepare(recipe, make_dataset(), device, resumed, mine)
    if neighbour:
        torch.manual_seed(0)
        move_to_neighbours(state.model)
    try:
        loop.go_on(state, path, observer)
    except loop.Interrupted:
        assert stop is not None
    return torch.tensor([loss for *_, loss in observer.steps])


def training():
    """`python together.py training FOLDER RECIPE [EPOCH STEP]`, as `train` takes them."""
    folder, options, *stop = sys.argv[2:]
    # All look up after each step.
    loop.REPORT_SECONDS = -1.0
    losses = train(Recipe(**eval(options)), Path(folder), JOINED, PLACE, tuple(map(int, stop)) or None)
    # Every process knows the losses of the whole batches.
    assert losses.allclose(JOINED.share(lambda: losses), rtol=0, atol=0)
    if JOINED.is_first:
        torch.save(losses, Path(folder) / "losses.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    JOINED, PLACE = ranks.start(os.environ.get("DEVICE", "cpu"))
    globals()[sys.argv[1]]()
    JOINED.end()
