"""What is compared: PyTorch's ways to run the reference, and ours to run the fused module, on the same tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconv.training.data import ImageSet

from .timing import Call
from .workloads import CLASSES, CLASSIFIERS, CONVNEXTS, EPOCH_IMAGES, Workload, input_shape, make_modules

# Inputs to rotate through, so that a call does not find its own in the nearest cache. Small ones all stay in a
# GPU's L2, as in a network, whose layer before has just written them: see `Runner.fits_in_l2`.
BATCHES = 4
BASELINE = "eager"


class Contender(NamedTuple):
    """A way to run a workload.

    Args:
        fused: with our module, instead of the reference.
        channels_last: maps and weights in that memory format.
        compile_mode: of torch.compile, if it is compiled.
        graph: captured in a CUDA graph by us, and replayed.
        gpu_only: would be the same as another on a CPU.
    """

    name: str
    fused: bool = False
    channels_last: bool = False
    compile_mode: str | None = None
    graph: bool = False
    gpu_only: bool = False

    @property
    def uses_graphs(self) -> bool:
        return self.graph or self.compile_mode == "reduce-overhead"


CONTENDERS = (
    Contender(BASELINE),
    Contender("eager channels_last", channels_last=True),
    Contender("compile", compile_mode="default"),
    # Without CUDA graphs, to compare kernels.
    Contender("compile max-autotune", compile_mode="max-autotune-no-cudagraphs"),
    Contender("compile reduce-overhead", compile_mode="reduce-overhead", gpu_only=True),
    Contender("fastconv", fused=True),
    Contender("fastconv compiled", fused=True, compile_mode="default"),
    Contender("fastconv in a CUDA graph", fused=True, graph=True, gpu_only=True),
)
QUICK = (BASELINE, "eager channels_last", "compile", "fastconv", "fastconv in a CUDA graph")


def choose(device: torch.device, quick: bool) -> list[Contender]:
    return [
        contender
        for contender in CONTENDERS
        if (device.type == "cuda" or not contender.gpu_only) and (not quick or contender.name in QUICK)
    ]


class Runner:
    """A contender ready to run a workload."""

    def __init__(self, contender: Contender, workload: Workload, device: torch.device, dtype: torch.dtype) -> None:
        self.contender, self.workload, self.device, self.dtype = contender, workload, device, dtype
        self.classifies = workload.level in CLASSIFIERS
        module = copy.deepcopy(make_modules(workload)[contender.fused]).to(device)
        # A classifier keeps its parameters in float32, as training does, and autocast rounds.
        if not self.classifies:
            module = module.to(dtype)
        generator = torch.Generator().manual_seed(1)
        shape = input_shape(workload)
        self.inputs = [
            torch.rand(shape, generator=generator).to(device, torch.float32 if self.classifies else dtype)
            for _ in range(BATCHES)
        ]
        self.labels = [torch.randint(CLASSES, shape[:1], generator=generator).to(device) for _ in range(BATCHES)]
        if contender.channels_last:
            module = module.to(memory_format=torch.channels_last)
            self.inputs = [x.contiguous(memory_format=torch.channels_last) for x in self.inputs]
        self.module: nn.Module = module
        self.parameters = list(module.parameters())
        self.apply: Callable[[Tensor], Tensor] = module
        if contender.compile_mode is not None:
            self.apply = torch.compile(module, mode=contender.compile_mode, dynamic=False)
        if not self.classifies:
            for x in self.inputs:
                x.requires_grad_()
        with torch.no_grad():
            y = module(self.inputs[0])
        self.grad = torch.randn(y.shape, generator=generator).to(y)

    def run(self, i: int) -> Tensor:
        enabled = self.classifies and self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype if enabled else torch.bfloat16, enabled=enabled):
            return self.apply(self.inputs[i % BATCHES])

    def forward(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.run(i)

    def gradients(self, y: Tensor, i: int, keep: bool = False) -> tuple[Tensor, ...]:
        """Of the parameters, and of the maps unless they are images."""
        leaves = [*self.parameters, *([] if self.classifies else [self.inputs[i % BATCHES]])]
        return torch.autograd.grad(y, leaves, self.grad.to(y.dtype), retain_graph=keep)

    def both(self, i: int) -> tuple[Tensor, ...]:
        y = self.run(i)
        return (y.detach(), *self.gradients(y, i))

    def call(self, direction: str) -> Call:
        """What is timed: it is given a number, by which it rotates through the inputs."""
        if self.workload.level == "epoch":
            return self.epoch()
        if self.workload.level in ("training_step", *CONVNEXTS):
            call: Call = self.stepper()
        elif direction == "backward":
            outputs = [self.run(i) for i in range(BATCHES)]

            def call(i: int) -> object:
                return self.gradients(outputs[i % BATCHES], i, keep=True)
        else:
            call = self.forward if direction == "forward" else self.both
        return capture(call) if self.contender.graph else call

    def can_run(self, direction: str) -> bool:
        """A CUDA graph holds the forward that its backward belongs to."""
        return direction != "backward" or not self.contender.uses_graphs

    def fits_in_l2(self) -> bool | None:
        """Whether all inputs that calls rotate through fit into the GPU's L2 cache together; None on a CPU."""
        if self.device.type != "cuda":
            return None
        size = sum(x.numel() * x.element_size() for x in self.inputs)
        return size <= torch.cuda.get_device_properties(self.device).L2_cache_size

    def stepper(self) -> Callable[[int], Tensor]:
        """A step of the lecture's training, which returns the loss."""
        on_gpu = self.device.type == "cuda"
        # Graphs need the second; the same optimizer for all.
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=on_gpu, capturable=on_gpu)

        def step(i: int) -> Tensor:
            loss = F.cross_entropy(self.run(i).float(), self.labels[i % BATCHES])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def epoch(self) -> Call:
        """Steps over shuffled batches that are cut out of images on the device.

        Where a step is a CUDA graph, a last batch that is smaller runs by itself.
        """
        x, labels = self.inputs[0], self.labels[0]
        images, step = self.epoch_images(), self.stepper()
        replay = capture(step, 1) if self.contender.graph else None

        def call(_: int) -> None:
            order = torch.randperm(len(images), device=self.device)
            for batch, answers in images.batches(self.workload.images, order):
                if replay is not None and len(batch) == len(x):
                    x.copy_(batch)
                    labels.copy_(answers)
                    replay(0)
                else:
                    self.inputs[0], self.labels[0] = batch, answers
                    step(0)
            self.inputs[0], self.labels[0] = x, labels

        return call

    def epoch_images(self) -> ImageSet:
        generator = torch.Generator().manual_seed(2)
        size = (EPOCH_IMAGES, *input_shape(self.workload)[1:])
        images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        labels = torch.randint(CLASSES, (EPOCH_IMAGES,), generator=generator)
        return ImageSet(images, labels).to(self.device)

    def results(self) -> list[Tensor]:
        """The output and each gradient for the first inputs, float64 on the CPU: to be judged."""
        call = capture(self.both, 1) if self.contender.graph else self.both
        found = call(0)
        assert isinstance(found, tuple)
        return [tensor.detach().double().cpu() for tensor in found]


def exact_results(workload: Workload, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """What `Runner.results` should be, by the reference in float64 on numbers rounded to `dtype`."""
    runner = Runner(CONTENDERS[0], workload, device, dtype)
    runner.module.double()
    runner.dtype = torch.float32
    runner.inputs = [x.detach().double().requires_grad_(not runner.classifies) for x in runner.inputs[:1]]
    runner.grad = runner.grad.double()
    return runner.results()


def capture(call: Callable[[int], object], count: int = BATCHES) -> Call:
    """Record `call`, for each of so many inputs, as a CUDA graph; the result replays them, and returns theirs.

    The graphs share their memory, but for what they return: one runs at a time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Compiles, and lets libraries allocate their workspaces.
        for i in range(count):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graphs: list[torch.cuda.CUDAGraph] = []
    outputs = []
    for i in range(count):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            outputs.append(call(i))
        graphs.append(graph)

    def replay(i: int) -> object:
        graphs[i % count].replay()
        return outputs[i % count]

    return replay


class Gate(NamedTuple):
    """Relative errors against float64, of the output and, root mean square, of the gradients."""

    output: float
    gradients: float


def judge(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Gate:
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    return Gate(errors[0], math.sqrt(sum(error**2 for error in errors[1:]) / (len(errors) - 1)))
