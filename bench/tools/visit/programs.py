"""Runs what a visit runs besides tests, without a GPU, to compile its kernels.

    python3 -m fastconv.bench.tools.visit.programs NAME

Each program calls the very code that the stages call, once instead of often.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

from fastconv.checking import divergence, graphs, runner
from fastconv.checking.cases import all_cases
from fastconv.checking.precisions import PRECISIONS, float32_products

from ...contenders import FASTCONV
from ...runner import Runner
from ...workloads import LECTURE, ConvNextBlock, Workload
from ..planned import PlannedSteps
from . import compilations, parts
from .kernels_only import Uncomputed, gpu_found, kernels_only

CPU = torch.device("cpu")


def check_cases() -> None:
    for case in all_cases():
        runner.examine(case, CPU)
    with mock.patch.object(divergence, "STEPS", 1), Uncomputed():
        runner.examine_training(CPU, lambda: None)
        # Of both precisions, for the tests.
        for precision in ("fp32", "bf16"):
            with mock.patch.object(graphs, "RECIPE", replace(graphs.RECIPE, epochs=1, precision=precision)):
                graphs.train(CPU, "off", lambda: None)


def sanitized() -> None:
    sys.path[:0] = [str(parts.ROOT / "tests"), str(parts.ROOT / "tests/kernels")]
    from test_gpu import SANITIZED

    exec(SANITIZED.replace('"cuda"', '"cpu"'), {})


def first_timings() -> None:
    # Not the planned steps' kernels: they are training's.
    for dtype in ("bfloat16", "float32"):
        for shape in LECTURE:
            launch(ConvNextBlock(128, *shape), dtype)


def benchmarks(stage: str) -> None:
    with gpu_found():
        from .benchmarks import series

    for dtype, workloads, _ in series(stage):
        for workload in workloads:
            launch(workload, dtype)


def launch(workload: Workload, dtype: str) -> None:
    """All kernels of a workload."""
    # Before nothing is computed: swapping compares a ConvNeXt's results before and after.
    workload.modules()
    with Uncomputed(), float32_products(PRECISIONS[dtype].matmul):
        Runner(FASTCONV, workload, CPU, PRECISIONS[dtype].dtype).warm_up()


def train() -> None:
    with gpu_found():
        from . import training
    training.DEVICE = CPU
    dataset = training.load(())
    for precision in ("bf16", "fp32"):
        with Uncomputed():
            recipe = replace(training.RECIPE, epochs=1, precision=precision, limit=128)
            training.run(training.FASTCONV_EAGER, recipe, dataset)


def tilings() -> None:
    with gpu_found():
        from . import tilings
    for dtype in tilings.DTYPES:
        for alternative in [(), *itertools.chain(*tilings.CHOICES)]:
            tilings.make_plan(PlannedSteps(dtype), alternative).prepare()


PROGRAMS: dict[str, Callable[[], None]] = {
    "whole": partial(benchmarks, "whole"),
    "check_cases": check_cases,
    "measure": partial(benchmarks, "measure"),
    "train": train,
    "tilings": tilings,
    "sanitized": sanitized,
    "first_timings": first_timings,
}


def main() -> None:
    compilations.count()
    with kernels_only():
        PROGRAMS[sys.argv[1]]()


if __name__ == "__main__":
    main()
