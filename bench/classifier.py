"""The lecture's classifier on the CPU, fused against what PyTorch offers: time, memory, and first accuracy.

    python -m bench.classifier

prints the table of the README, as Markdown.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import fastconv
from fastconv import reference
from fastconv.training import keep_freed_memory

from . import timing

CONTENDERS = ("reference", "reference, channels_last", "torch.compile(reference)", "fastconv")
DIRECTIONS = ("forward", "forward + backward")
# Batches to rotate through, so that none stays in a cache.
BATCHES = 4


def build(name: str) -> Callable[[Tensor], Tensor]:
    """One of the contenders, all with the same weights."""
    torch.manual_seed(0)
    model = reference.Classifier()
    if name == "fastconv":
        fused = fastconv.Classifier()
        fused.load_state_dict(model.state_dict())
        return fused
    if name == "reference, channels_last":
        return model.to(memory_format=torch.channels_last)
    if name == "torch.compile(reference)":
        return torch.compile(model)
    return model


def make_batches(name: str, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(BATCHES):
        images = torch.rand(batch_size, 3, 32, 32, generator=generator)
        if name == "reference, channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        batches.append((images, torch.randint(10, (batch_size,), generator=generator)))
    return batches


def make_call(name: str, direction: str, batch_size: int) -> Callable[[int], object]:
    model, batches = build(name), make_batches(name, batch_size)
    parameters = list(model.parameters())

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return model(batches[i % BATCHES][0])

    def forward_backward(i: int) -> tuple[Tensor, ...]:
        images, labels = batches[i % BATCHES]
        return torch.autograd.grad(F.cross_entropy(model(images), labels), parameters)

    return forward if direction == "forward" else forward_backward


def errors(name: str, batch_size: int) -> tuple[float, float]:
    """The relative errors of the logits and of all gradients together, against float64."""

    def run(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        images, labels = make_batches(name, batch_size)[0]
        logits = model(images.to(dtype))
        grads = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
        return logits.detach().double(), torch.cat([grad.flatten() for grad in grads]).double()

    exact = run(build("reference").double(), torch.float64)
    found = run(build(name), torch.float32)
    return tuple(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def measure_peak_memory(name: str, direction: str, batch_size: int, threads: int) -> str:
    """MiB above what the model and its inputs hold, in a process of its own; "-" where it cannot be known."""
    code = "import sys; from fastconv.bench.classifier import report_peak; report_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, direction, str(batch_size), str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return child.stdout.strip()


def report_peak(name: str, direction: str, batch_size: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    call = make_call(name, direction, int(batch_size))
    # Libraries load their code, and compilers compile, at first use: that is not the operation's memory.
    call(0)
    before = timing.reset_peak_memory()
    if before is None:
        print("-")
        return
    for i in range(3):
        call(i)
    print(f"{(timing.peak_memory() - before) / 2**20:.0f}")


def main(
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contender is timed.")] = 40,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
) -> None:
    """Print the table of the README."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    print(f"Batch of {batch_size}; {timing.provenance()}\n")
    columns = [
        "",
        "contender",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "speed-up",
        "peak MiB",
        "error",
        "gradients' error",
    ]
    print(f"| {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) - 2)}")
    accuracy = {name: errors(name, batch_size) for name in CONTENDERS}
    bounds = [max(2 * error, 5e-6) for error in accuracy["reference"]]
    for direction in DIRECTIONS:
        calls = {name: make_call(name, direction, batch_size) for name in CONTENDERS}
        times = timing.interleave(calls, rounds, warmup=3)
        for name in CONTENDERS:
            right = all(error <= bound for error, bound in zip(accuracy[name], bounds, strict=True))
            speedup = f"{times['reference'].p50 / times[name].p50:.2f}x" if right else "wrong result"
            memory = measure_peak_memory(name, direction, batch_size, threads)
            cells = [direction, name, *(f"{t:.1f}" for t in times[name]), speedup, memory]
            print(f"| {' | '.join(cells)} | {accuracy[name][0]:.1e} | {accuracy[name][1]:.1e} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
