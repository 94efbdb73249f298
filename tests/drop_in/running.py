"""How models are run: memory, threads, processes, layouts."""

import asyncio
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fastconv

from .models import trained
from .table import feature


@feature("`torch.no_grad`")
def no_grad(model, x):
    with torch.no_grad():
        return {"y": model(x)}


@feature("`torch.inference_mode`")
def inference_mode(model, x):
    with torch.inference_mode():
        return {"y": model(x).clone()}


@feature("inference tensors outside inference mode")
def inference_tensors(model, x):
    with torch.inference_mode():
        x = x.clone()
    with torch.no_grad():
        return {"y": model(x)}


@feature("checkpointing")
def checkpointed(model, x):
    x = x.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=False)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@feature("hooks for saved tensors")
def saved_tensors(model, x):
    with save_on_cpu():
        return trained(model, x)


@feature("channels_last")
def channels_last(model, x):
    found = trained(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))
    # Gradients, as DistributedDataParallel wants, have the strides of the parameters.
    return found | {
        f"{name}, strides": torch.tensor(value.stride())
        for name, value in found.items()
        if name in dict(model.named_parameters())
    }


@feature("`clip_grad_norm_`")
def clipped(model, x):
    model(x).square().sum().backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return {"norm": total} | {name: p.grad for name, p in model.named_parameters()}


@feature("gradients added up over batches")
def accumulated(model, x):
    for part in x.chunk(2):
        model(part).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@feature("fused optimizers")
def optimised(model, x):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return {"y": model(x).detach()}


@feature("threads (as in `DataParallel`)")
def threads(model, x):
    def work(part):
        y = model(part)
        y.square().sum().backward()
        return y.detach()

    with ThreadPoolExecutor(2) as pool:
        ys = list(pool.map(work, x.chunk(2)))
    return {"y": torch.cat(ys)} | {name: p.grad for name, p in model.named_parameters()}


@feature("asyncio tasks")
def tasks(model, x):
    async def work(name, part):
        with fastconv.backend(name):
            await asyncio.sleep(0)
            y = model(part)
            await asyncio.sleep(0)
            return y

    async def both():
        return await asyncio.gather(*map(work, ("auto", "reference"), x.chunk(2)))

    return {"y": torch.cat(asyncio.run(both())).detach()}


class Computed(Dataset):
    """What a model makes of each batch of two images, as for features that workers compute."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x) // 2

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(self.x[2 * index : 2 * index + 2])


@feature("a `DataLoader`'s forked worker")
def forked(model, x):
    # As after training: the threads of OpenMP do not live on in a fork.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trained(model, x)
        loader = DataLoader(
            Computed(model, x), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        return {"y": torch.cat(list(loader))}
    finally:
        torch.set_num_threads(before)


@contextmanager
def group():
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = distributed.FileStore(os.path.join(folder, "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


@feature("`DistributedDataParallel`")
def distributed_data_parallel(model, x):
    with group():
        DistributedDataParallel(model)(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@feature("reentrant checkpointing")
def reentrant(model, x):
    x = x.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=True)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@feature("an empty batch")
def empty(model, x):
    y = model(x[:0])
    return {"shape": torch.tensor(y.shape)}


@feature("deterministic algorithms")
def deterministic(model, x):
    torch.use_deterministic_algorithms(True)
    try:
        return trained(model, x)
    finally:
        torch.use_deterministic_algorithms(False)


class Tagged(torch.Tensor):
    """A subclass, as libraries make them."""


@feature("subclasses of tensors")
def subclass(model, x):
    y = model(x.as_subclass(Tagged))
    assert type(y) is Tagged
    return {"y": y.detach().as_subclass(torch.Tensor)}


@feature("`fully_shard`")
def fully_sharded(model, x):
    with group():
        mesh = distributed.init_device_mesh("cpu", (1,))
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        y = model(x)
        y.square().sum().backward()
        return {"y": y.detach()} | {name: p.grad.full_tensor() for name, p in model.named_parameters()}
