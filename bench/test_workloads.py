"""The most important workloads as a pytest-benchmark suite: `pytest bench --benchmark-only`.

`fastconv bench` times the same in turns, which compares better on a machine that others share; pytest-benchmark
keeps and compares runs (`--benchmark-autosave`, `--benchmark-compare`).
"""

import functools
import itertools

import pytest
import torch

from fastconv import accuracy, machine
from fastconv.machine import keep_freed_memory

from . import contenders, correctness, suite, workloads
from .runner import Runner, exact_results

DEVICE = machine.choose_device("auto")
LEVELS = [workload for workload in workloads.quick() if workload.images == 128]
TIMED = [(workload, direction) for workload in LEVELS for direction in workload.directions]


@functools.cache
def errors(workload, contender):
    exact = exact_results(workload, DEVICE, torch.float32)
    runner = Runner(contender, workload, DEVICE, torch.float32)
    return correctness.measure(runner.results(), exact)


@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("contender", contenders.choose(DEVICE, quick=True), ids=lambda contender: contender.name)
@pytest.mark.parametrize(("workload", "direction"), TIMED, ids=str)
def test_workload(benchmark, workload, direction, contender):
    baseline = errors(workload, contenders.EAGER)
    assert errors(workload, contender).right(baseline, accuracy.FLOOR[torch.float32])
    keep_freed_memory()
    suite.start_compiling()
    call = Runner(contender, workload, DEVICE, torch.float32).call(direction)
    numbers = itertools.count()

    def timed():
        call(next(numbers))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    timed()
    benchmark.group = f"{workload}, {direction}"
    benchmark(timed)
