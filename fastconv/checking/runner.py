"""Runs `fastconv check`: every operation and module against float64, then trainings against each other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import IO

import torch

from fastconv import accuracy
from fastconv.checking import divergence, graphs, problems
from fastconv.checking.cases import Case
from fastconv.checking.precisions import PRECISIONS, float32_products
from fastconv.checking.report import Graphs, Report, Result, Training
from fastconv.operations import backends, functional

# Triton's interpreter takes up to a second for one.
INTERPRETED_SAMPLES = 2
# Rows of all images of a stencil: the interpreter takes a second and a half for each, forward and backward.
MOST_INTERPRETED_ROWS = 8


def run(
    device: torch.device,
    cases: Sequence[Case],
    advanced: Callable[[str], None],
    kept: IO[str] | None = None,
) -> Report:
    """Try all cases, then train.

    Args:
        advanced: called after each case and each step of the training, with a name of what was done.
        kept: a file to which each result is written as soon as it is there, as a line of JSON.

    Raises:
        BackendUnavailable: Triton's interpreter fails whatever the kernel.
    """
    started = time.monotonic()
    check_interpreter(device)
    results = []
    with torch.random.fork_rng(devices=[]):
        for case in cases:
            results.append(examine(case, device))
            keep(results[-1], kept)
            advanced(str(case))
        training = examine_training(device, lambda: advanced("training"))
        keep(training, kept)
        found = examine_graphs(device, lambda: advanced("CUDA graphs"))
        keep(found, kept)
    return Report(device, results, training, found, time.monotonic() - started)


def keep(result: Result | Training | Graphs, file: IO[str] | None) -> None:
    if file is not None:
        print(json.dumps(result.as_json(), allow_nan=False), file=file, flush=True)


def steps(cases: Sequence[Case]) -> int:
    """How often `run` calls `advanced`."""
    return len(cases) + 3 * divergence.STEPS + graphs.STEPS


def check_interpreter(device: torch.device) -> None:
    """Raise BackendUnavailable if Triton's interpreter has to run the kernels, but cannot run the smallest."""
    if not interprets(backends.current(), device):
        return
    try:
        functional.layer_norm(torch.zeros(1, 1, 1, 1))
    except Exception as error:
        raise backends.BackendUnavailable(
            f"Triton's interpreter fails here ({describe(error)}); it needs NumPy, "
            'and Triton older than 3.7 a NumPy older than 2.4: pip install "numpy<2.4"'
        ) from error


def examine(case: Case, device: torch.device) -> Result:
    """Try a case. An exception makes it wrong, so that the other cases are still tried."""
    backend, reason = choose_backend(case, device)
    if backend is None:
        return Result(case, None, "skipped", reason)
    precision = PRECISIONS[case.precision]

    def sample() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        ours, definition, tensors = problems.pose(case)
        names, inputs = list(tensors), list(tensors.values())
        where = case.input.layout, precision.dtype, precision.autocast, device
        return accuracy.compare(ours, definition, inputs, names, *where)

    samples = INTERPRETED_SAMPLES if interprets(backend, device) else accuracy.SAMPLES
    try:
        torch.manual_seed(0)
        with float32_products(precision.matmul), backends.backend(backend):
            errors = accuracy.judge(sample, precision.floor, samples)
    except Exception as error:
        return Result(case, backend, "wrong", describe(error))
    name, worst = accuracy.worst(errors)
    if worst.right:
        return Result(case, backend, "right", errors=errors)
    return Result(case, backend, "wrong", f"{name}: {worst}", errors)


def examine_training(device: torch.device, stepped: Callable[[], None]) -> Training:
    size = divergence.SMALL if interprets(backends.current(), device) else divergence.LECTURE
    try:
        with float32_products("highest"):
            found = divergence.measure(device, size, stepped)
    except Exception as error:
        return Training("wrong", describe(error))
    if found.right:
        return Training("right", divergence=found)
    reason = f"losses differ by {found.difference:.1e}; at most {found.bound:.1e} is right"
    return Training("wrong", reason, found)


def examine_graphs(device: torch.device, stepped: Callable[[], None]) -> Graphs:
    if device.type != "cuda":
        return Graphs("skipped", f"{device.type} has no CUDA graphs")
    try:
        difference = graphs.compare(device, stepped)
    except Exception as error:
        return Graphs("wrong", describe(error))
    return Graphs("right") if difference is None else Graphs("wrong", difference)


def choose_backend(case: Case, device: torch.device) -> tuple[str | None, str]:
    """The backend that will run a case, or None, and why not."""
    if case.precision == "tf32" and device.type != "cuda":
        return None, "tf32 is a format of GPUs"
    dtype = torch.bfloat16 if PRECISIONS[case.precision].autocast else PRECISIONS[case.precision].dtype
    for name in backends.candidates():
        reason = backends.can_run(name, device, dtype)
        if reason is None and interprets(name, device):
            reason = why_not_interpreted(case, dtype)
        if reason is None:
            return name, ""
    return None, reason or ""


def why_not_interpreted(case: Case, dtype: torch.dtype) -> str | None:
    if dtype == torch.bfloat16:
        return "Triton's interpreter computes with the bits of bfloat16 as if they were integers"
    sizes = case.input.sizes
    if case.is_stencil and sizes.images * sizes.height > MOST_INTERPRETED_ROWS:
        return "Triton's interpreter would take minutes; the tests try its kernels on less"
    return None


def interprets(backend: str, device: torch.device) -> bool:
    return backend == "triton" and device.type == "cpu"


def describe(error: BaseException) -> str:
    """The first cause of an error, in one line: Triton's interpreter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
