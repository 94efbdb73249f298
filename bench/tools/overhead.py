"""What a call costs the host: Python, PyTorch's dispatch and autograd, and Triton's launcher, without a GPU.

    python -m bench.tools.overhead

calls the operations eagerly over a libcuda that does nothing: a call that reaches a GPU takes some microseconds
more for each launch, and to allocate. Backward passes include what torch.autograd.grad takes by itself, which the
row "nothing" shows. Of a training step by autograd only Triton's launches are counted: what PyTorch does there it
computes here, on the CPU.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor

from fastconv.kernels.toeplitz.tiling import ToeplitzTiling
from fastconv.modules import Classifier
from fastconv.operations import backends

from .. import results, tables
from . import budget
from .null_gpu import null_gpu
from .planned import PlannedSteps

OPERATIONS = (
    budget.convnext_block,
    budget.depthwise_conv_layer_norm,
    budget.pointwise_conv_gelu,
    budget.layer_norm,
)
# Rounds in which all calls take turns, because the machine's speed drifts.
ROUNDS = 10


class Nothing(torch.autograd.Function):
    """An operation with as many inputs as a block and no work: its time is autograd's."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


def calls_of(call: Callable[[], Tensor], tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The calls to time, by direction."""
    y = call()
    backward = partial(torch.autograd.grad, y, tensors, torch.empty_like(y), retain_graph=True, allow_unused=True)

    def without_gradients() -> None:
        with torch.no_grad():
            call()

    return {"forward": call, "backward": backward, "forward without gradients": without_gradients}


def one_launch(x: Tensor, weight: Tensor) -> Callable[[], object]:
    """A launch of a block's first kernel alone."""
    tiling = ToeplitzTiling(x, weight, "tensor")
    h, moments = tiling.new_h(weight), tiling.new_moments(weight)
    return partial(tiling.forward(x, has_bias=False), x, weight, None, h, moments)


def step_by_autograd() -> Callable[[], object]:
    """Forward and backward of the lecture's classifier by Triton's kernels, which are only launched on a GPU."""
    model, images = Classifier(), torch.rand(128, 3, 32, 32)

    def step() -> None:
        with mock.patch.object(backends, "can_run", return_value=None), backends.backend("triton"):
            model(images).sum().backward()

    return step


def median_time(call: Callable[[], object], count: int) -> float:
    """The median time of a call, in microseconds."""
    return 1e6 * median(timeit.repeat(call, number=1, repeat=count))


def main(count: Annotated[int, typer.Option(min=1, help="How often each call is timed in a round.")] = 60) -> None:
    """Print microseconds per call of each operation."""
    tensors = budget.LECTURE[0].tensors(torch.float32)
    leaves = list(tensors.values())
    with null_gpu() as library:
        calls = {call.__name__: calls_of(partial(call, tensors), leaves) for call in OPERATIONS}
        inputs = [tensor for name, tensor in tensors.items() if name != "h"]
        calls["nothing, of a block's inputs"] = calls_of(partial(Nothing.apply, *inputs), leaves)
        calls["one launch"] = {"forward": one_launch(tensors["x"], tensors["depthwise_weight"])}
        steps = PlannedSteps(torch.float32)
        calls["planned step"] = {"training": steps.training(), "evaluation": steps.evaluation()}
        timed = [(name, direction, call) for name, of in calls.items() for direction, call in of.items()]
        # The first call compiles.
        launches = [count_launches(library, call) for *_, call in timed]
        launches_by_autograd = count_launches(library, step_by_autograd())
        rounds = [[median_time(call, count) for *_, call in timed] for _ in range(ROUNDS)]
    print(f"{tables.machine(results.provenance(torch.device('cpu')))}\n")
    print("| operation | direction | launches | us |\n|---|---|---:|---:|")
    for (name, direction, _), number, *times in zip(timed, launches, *rounds, strict=True):
        print(f"| {name} | {direction} | {number} | {median(times):.0f} |")
    print(f"| step by autograd, without its optimizer | training | {launches_by_autograd} | |")


def count_launches(library: Any, call: Callable[[], object]) -> int:
    call()
    before = library.null_launches()
    call()
    return library.null_launches() - before


if __name__ == "__main__":
    typer.run(main)
