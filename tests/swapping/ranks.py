"""One of several processes that train models together: `python ranks.py RANK FOLDER`, with the store in FOLDER.

It leaves there for each case what came of the training, and which warnings there were.
"""

import os
import sys
import warnings
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import networks
import torch
from drop_in import models
from torch import distributed
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastconv
from fastconv.operations import backends, dispatch

PROCESSES = 2
STEPS = 3
IMAGES = 4  # of each process
# Large enough that blocks on some maps leave the convolution to PyTorch, whose gradients have other strides.
IMAGE = 3, 32, 32


def torchvisions():
    torch.manual_seed(0)
    plain = networks.NETWORKS["torchvision/ConvNeXt"].create()
    return models.swapped(plain)


# Each makes a plain model and one of ours.
MODELS = {"torchvision's, swapped": torchvisions, **{name: partial(models.pair, name) for name in models.PAIRS}}


def sharded(model, prepare=lambda block: None):
    """A block at a time, then the whole."""
    mesh = distributed.init_device_mesh("cpu", (PROCESSES,))
    for block in list(model.modules()):
        if type(block).__name__ in ("CNBlock", "ConvNeXtBlock", "ConvNextBlock"):
            prepare(block)
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


compiled = partial(torch.compile, backend="aot_eager")
WAYS = {
    "DDP": DistributedDataParallel,
    "DDP, static graph, buckets as gradients": partial(
        DistributedDataParallel, gradient_as_bucket_view=True, static_graph=True
    ),
    "fully_shard": sharded,
}
COMPILED_WAYS = {
    "compiled, then DDP": lambda model: DistributedDataParallel(compiled(model, fullgraph=True)),
    # DDP itself splits the graph where a bucket of gradients is full.
    "DDP, then compiled": lambda model: compiled(DistributedDataParallel(model)),
    "blocks compiled, then fully_shard": partial(
        sharded, prepare=lambda block: block.compile(backend="aot_eager", fullgraph=True)
    ),
}


class Case(NamedTuple):
    model: str
    way: str
    backend: str

    def __str__(self):
        return "; ".join(self)

    @property
    def is_compiled(self):
        return self.way in COMPILED_WAYS


CASES = [Case(model, way, backend) for model in MODELS for way in WAYS for backend in ("portable", "native")]
CASES += [Case("ConvNeXt, swapped", way, "portable") for way in COMPILED_WAYS]
CASES += [Case("each module", "compiled, then DDP", "portable")]


def batches():
    """The images and labels of all processes together, for each step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.rand(PROCESSES * IMAGES, *IMAGE, generator=generator)
        yield images, torch.randint(5, (len(images),), generator=generator)


def loss_of(outputs, labels):
    # Maps or logits.
    return F.cross_entropy(outputs.flatten(2).mean(2) if outputs.dim() == 4 else outputs, labels)


def train(model, forward, batches):
    """The losses, the gradients and the parameters after the last step.

    Args:
        model: whose parameters are trained.
        forward: the model, or what it is wrapped in.
        batches: for each step the parts of a batch, whose losses count equally.
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    found = {}
    for step, parts in enumerate(batches):
        optimizer.zero_grad()
        loss = sum(loss_of(forward(images), labels) for images, labels in parts) / len(parts)
        loss.backward()
        optimizer.step()
        found[f"loss {step}"] = loss.detach()
    for name, parameter in model.named_parameters():
        name = name.replace("_orig_mod.", "")
        found[f"gradient of {name}"] = whole(parameter.grad)
        found[name] = whole(parameter.detach())
    return found


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def run(case, rank):
    plain, ours = MODELS[case.model]()
    own = slice(rank * IMAGES, (rank + 1) * IMAGES)
    parts = [[(images[own], labels[own])] for images, labels in batches()]
    wrap = (WAYS | COMPILED_WAYS)[case.way]
    eager, call = [], dispatch._call

    def counted(name, *rest):
        if not torch.compiler.is_compiling():
            eager.append(name)
        return call(name, *rest)

    dispatch._call = counted
    with warnings.catch_warnings(record=True) as caught, fastconv.backend(case.backend):
        warnings.simplefilter("always")
        found, breaks = traced(ours, wrap, parts)
    dispatch._call = call
    if breaks:
        # DDP, which is compiled too, has some of its own.
        breaks -= traced(plain, wrap, parts)[1]
    for name, value in found.items():
        if name.startswith("loss"):
            distributed.all_reduce(value)
            value /= PROCESSES
    messages = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    return {"found": found, "warnings": messages, "breaks": breaks, "operations": len(eager)}


def traced(model, wrap, parts):
    """What comes of the training, and why the compiler broke graphs."""
    torch.compiler.reset()
    counters.clear()
    return train(model, wrap(model), parts), set(counters["graph_break"])


def main(rank, folder):
    store = distributed.FileStore(os.path.join(folder, "store"), PROCESSES)
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=limit)
    # PyTorch warns of strides once in a process.
    torch.set_warn_always(True)
    refused = {name: backends.can_run(name, torch.device("cpu"), torch.float32) for name in ("portable", "native")}
    for case in CASES:
        if refused[case.backend] is None:
            torch.save(run(case, rank), os.path.join(folder, f"{CASES.index(case)} of {rank}.pt"))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
