"""First numbers, of planned steps and of lecture blocks: as a replayed CUDA graph, as an eager call, on the host.

    python3 -m fastconv.bench.tools.visit.first_timings FILE

FILE gets a line of JSON for the steps in each dtype, then for each block, dtype and direction.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import timing
from ...contenders import FASTCONV, Contender
from ...runner import Runner, capture
from ...timing import Call
from ...workloads import LECTURE, ConvNextBlock
from ..planned import PlannedSteps
from . import compilations
from .stage import DEVICE, ON_GPU

IMAGES = 128 if ON_GPU else 2
WAYS = {"fastconv": FASTCONV, "PyTorch": Contender("PyTorch")}
# A CPU takes seconds for bfloat16.
DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32,)
ROUNDS = 20
# Calls whose kernels the GPU queues, so that the host does not wait.
HOST_CALLS = 50


def main() -> None:
    compilations.count()
    with Path(sys.argv[1]).open("w") as kept:

        def show(what: str, row: dict[str, Any], calls: dict[str, Call]) -> None:
            found = measure(calls)
            print(json.dumps(row | {"microseconds": found}), file=kept, flush=True)
            numbers = ", ".join(f"{name} {us:.4g}" for name, us in found.items())
            print(f"{what}, us: {numbers}", flush=True)

        # A CPU would interpret each of a step's kernels.
        for dtype in DTYPES if ON_GPU else ():
            row = {"level": "planned_step", "dtype": name_of(dtype)}
            show(f"planned step, {name_of(dtype)}", row, steps(dtype))
        for dtype in DTYPES:
            for shape in LECTURE:
                workload = ConvNextBlock(IMAGES, *shape)
                runners = {name: Runner(way, workload, DEVICE, dtype) for name, way in WAYS.items()}
                for direction in ("forward", "both"):
                    row = {**workload.as_row(), "dtype": name_of(dtype), "direction": direction}
                    calls = {name: runner.call(direction) for name, runner in runners.items()}
                    show(f"{workload}, {name_of(dtype)}, {direction}", row, calls)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def steps(dtype: torch.dtype) -> dict[str, Call]:
    planned = PlannedSteps(dtype, DEVICE)
    plans = {"training": planned.training(), "evaluation": planned.evaluation()}
    return {name: planned.repeated(plan) for name, plan in plans.items()}


def measure(eager: dict[str, Call]) -> dict[str, float]:
    """Median times of each call, in microseconds."""
    calls = dict(eager)
    if ON_GPU:
        calls |= {f"{name} in a graph": capture(call) for name, call in eager.items()}
    samples = timing.interleave(calls, ROUNDS, 2, DEVICE)
    found = {name: 1e3 * timing.percentiles(times).p50 for name, times in samples.items()}
    return found | {f"host of {name}": host_microseconds(call) for name, call in eager.items()}


def host_microseconds(call: Callable[[int], object]) -> float:
    """The time that the host spends on a call, in microseconds."""
    samples = []
    for _ in range(5):
        if ON_GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(HOST_CALLS):
            call(i)
        samples.append((time.perf_counter() - start) / HOST_CALLS)
    return 1e6 * timing.percentiles(samples).p50


if __name__ == "__main__":
    main()
