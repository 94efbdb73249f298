"""What a call costs the host: Python, PyTorch's dispatch and autograd, and Triton's JIT, without a GPU.

    python -m bench.overhead

calls the operations eagerly with launches that do nothing: one that reaches a GPU costs some microseconds more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer

from . import results, tables
from .budget import OPERATIONS, SHAPES
from .dry_run import dry_run


def median_time(call: Callable[[], object], rounds: int) -> float:
    """In microseconds."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return torch.tensor(samples, dtype=torch.float64).median().item() * 1e6


def main(rounds: Annotated[int, typer.Option(min=1, help="How often each call is timed.")] = 300) -> None:
    """Print microseconds per call of each operation."""
    print(f"{tables.machine(results.provenance(torch.device('cpu')))}\n")
    print("| operation | direction | launches | us | us a launch |\n|---|---|---:|---:|---:|")
    for operation, call in OPERATIONS.items():
        tensors = SHAPES[0].tensors(torch.float32)
        with dry_run("sm_90") as launches:
            y = call(tensors)
            calls: dict[str, Callable[[], object]] = {
                "forward": partial(call, tensors),
                "backward": partial(
                    torch.autograd.grad,
                    y,
                    list(tensors.values()),
                    torch.empty_like(y),
                    retain_graph=True,
                    allow_unused=True,
                ),
            }
            for direction, timed in calls.items():
                # The first call compiles.
                timed()
                launches.clear()
                timed()
                count, elapsed = len(launches), median_time(timed, rounds)
                print(f"| {operation} | {direction} | {count} | {elapsed:.0f} | {elapsed / count:.0f} |")


if __name__ == "__main__":
    typer.run(main)
