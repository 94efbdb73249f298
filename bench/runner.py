"""A contender ready to run a workload: its module, its tensors, and the calls that are timed and judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv import graphs
from fastconv.training.data import ImageSet
from fastconv.training.sets import Batches

from .contenders import EAGER, Contender
from .timing import Call
from .workloads import CLASSES, EPOCH_IMAGES, Workload

# Inputs to rotate through, so that a call does not find its own in the nearest cache. Small ones all stay in a
# GPU's L2, as in a network, where the layer before has just written them: see `Runner.fits_in_l2`.
BATCHES = 4


class Runner:
    """A contender ready to run a workload.

    Args:
        dtype: of maps and parameters; a classifier's stay float32, as in training, and autocast rounds.
        exact: compute in float64 instead, with the same numbers, rounded to the same dtype.
    """

    def __init__(
        self,
        contender: Contender,
        workload: Workload,
        device: torch.device,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> None:
        self.contender, self.workload, self.device = contender, workload, device
        self.autocast_dtype = dtype if workload.classifies and dtype != torch.float32 and not exact else None
        stored = torch.float32 if workload.classifies else dtype

        def rounded(x: Tensor) -> Tensor:
            x = x.to(device, stored)
            return x.double() if exact else x

        module = copy.deepcopy(workload.modules()[contender.fused]).to(device, stored)
        if exact:
            module = module.double()
        generator = torch.Generator().manual_seed(1)
        shape = workload.input_shape
        self.inputs = [rounded(torch.rand(shape, generator=generator)) for _ in range(BATCHES)]
        self.labels = [torch.randint(CLASSES, shape[:1], generator=generator).to(device) for _ in range(BATCHES)]
        if contender.channels_last:
            module = module.to(memory_format=torch.channels_last)
            self.inputs = [x.contiguous(memory_format=torch.channels_last) for x in self.inputs]
        self.parameters = list(module.parameters())
        self.apply: Callable[[Tensor], Tensor] = module
        if contender.compile_mode is not None:
            self.apply = torch.compile(module, mode=contender.compile_mode, dynamic=False)
        if not workload.classifies:
            for x in self.inputs:
                x.requires_grad_()
        with torch.no_grad():
            y = module(self.inputs[0])
        self.grad = rounded(torch.randn(y.shape, generator=generator))

    def run(self, i: int) -> Tensor:
        dtype = self.autocast_dtype
        with torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return self.apply(self.inputs[i % BATCHES])

    def forward(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.run(i)

    def gradients(self, y: Tensor, i: int, keep: bool = False) -> tuple[Tensor, ...]:
        """The gradients of the parameters, and of the maps unless they are images."""
        leaves = [*self.parameters, *([] if self.workload.classifies else [self.inputs[i % BATCHES]])]
        return torch.autograd.grad(y, leaves, self.grad.to(y.dtype), retain_graph=keep)

    def both(self, i: int) -> tuple[Tensor, ...]:
        y = self.run(i)
        return (y.detach(), *self.gradients(y, i))

    def call(self, direction: str) -> Call:
        """What is timed: a function of a number, by which it rotates through the inputs."""
        if self.workload.is_epoch:
            return self.epoch()
        if self.workload.trains:
            call: Call = self.stepper()
        elif direction == "backward":
            outputs = [self.run(i) for i in range(BATCHES)]

            def call(i: int) -> object:
                return self.gradients(outputs[i % BATCHES], i, keep=True)
        else:
            call = self.forward if direction == "forward" else self.both
        return capture(call) if self.contender.graph else call

    def can_run(self, direction: str) -> bool:
        """Whether the contender has this direction: a CUDA graph cannot hold a backward without its forward."""
        return direction != "backward" or not self.contender.uses_graphs

    def fits_in_l2(self) -> bool | None:
        """Whether all inputs that calls rotate through fit into the GPU's L2 cache together; None on a CPU."""
        if self.device.type != "cuda":
            return None
        size = sum(x.numel() * x.element_size() for x in self.inputs)
        return size <= torch.cuda.get_device_properties(self.device).L2_cache_size

    def stepper(self) -> Callable[[int], Tensor]:
        """A step of the lecture's training, which returns the loss."""
        device = self.device.type
        # All contenders get the same optimizer; graphs need `capturable`.
        optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, fused=device in ("cpu", "cuda"), capturable=device == "cuda"
        )

        def step(i: int) -> Tensor:
            loss = F.cross_entropy(self.run(i).float(), self.labels[i % BATCHES])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def epoch(self) -> Call:
        """Steps over shuffled batches of images on the device.

        If a step is a CUDA graph, a smaller last batch runs without it.
        """
        x, labels = self.inputs[0], self.labels[0]
        generator = torch.Generator().manual_seed(2)
        size = (EPOCH_IMAGES, *self.workload.input_shape[1:])
        pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        images = ImageSet(pixels, torch.randint(CLASSES, size[:1], generator=generator)).to(self.device)
        batches = Batches(images, self.workload.images)
        step = self.stepper()
        replay = capture(step, 1) if self.contender.graph else None

        def call(_: int) -> None:
            order = torch.randperm(len(images), device=self.device)
            for count in batches.start(order):
                batch, answers = batches.next(count)
                if replay is not None and len(batch) == len(x):
                    x.copy_(batch)
                    labels.copy_(answers)
                    replay(0)
                else:
                    self.inputs[0], self.labels[0] = batch, answers
                    step(0)
            self.inputs[0], self.labels[0] = x, labels

        return call

    def warm_up(self) -> None:
        """Run all that is judged and timed once, so that it is compiled."""
        self.results()
        for direction in self.workload.directions:
            if self.can_run(direction):
                self.call(direction)(0)

    def results(self) -> list[Tensor]:
        """The output and each gradient for the first inputs, as float64 on the CPU, to be judged."""
        call = capture(self.both, 1) if self.contender.graph else self.both
        found = call(0)
        assert isinstance(found, tuple)
        return [tensor.detach().double().cpu() for tensor in found]


def exact_results(workload: Workload, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """What `Runner.results` should be, by the reference in float64 on numbers rounded to `dtype`."""
    return Runner(EAGER, workload, device, dtype, exact=True).results()


def capture(call: Callable[[int], object], count: int = BATCHES) -> Call:
    """Record `call` for each of `count` inputs as a CUDA graph; return a function that replays them.

    The graphs share their memory, except for what they return: one runs at a time.
    """
    device, pool = torch.device("cuda", torch.cuda.current_device()), torch.cuda.graph_pool_handle()
    # The warm-up compiles, and libraries allocate their workspaces.
    replays = [graphs.capture(partial(call, i), device, warm_ups=1, pool=pool) for i in range(count)]
    return lambda i: replays[i % count]()
