"""Runs workloads: first judges each contender's results, then times it in turns with the others."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch
import torch._functorch.config

from fastconv.checking.precisions import PRECISIONS, float32_products
from fastconv.machine import keep_freed_memory
from fastconv.operations import fallback

from . import ceilings, correctness, timing
from .contenders import BASELINE, Contender
from .correctness import Errors
from .runner import Runner, exact_results
from .timing import Call
from .workloads import Workload

Row = dict[str, Any]

# Bounds on the rounds that fill the seconds of a direction.
LEAST_ROUNDS, MOST_ROUNDS = 5, 50


def run(
    workloads: Sequence[Workload],
    chosen: Sequence[Contender],
    device: torch.device,
    dtype_name: str,
    seconds: float,
    advanced: Callable[[str], None],
) -> Iterator[list[Row]]:
    """Yield the rows of each workload.

    Args:
        dtype_name: of the tensors; "tf32" means float32, with products and convolutions in tf32.
        seconds: to spend on timing each direction of a workload; compiling and judging come on top.
        advanced: called after each direction of a workload, with the names of both.
    """
    keep_freed_memory()
    with float32_products(PRECISIONS[dtype_name].matmul):
        limits = ceilings.measure(device, PRECISIONS[dtype_name].dtype)
        for workload in workloads:
            start_compiling()
            yield list(measure(workload, chosen, device, dtype_name, limits, seconds, advanced))


def start_compiling() -> None:
    """Prepare torch.compile for the contenders of a workload."""
    # Otherwise compiled backward functions free what a second call of them needs.
    torch._functorch.config.donated_buffer = False
    # Otherwise, after another size was compiled, the next function is compiled for all sizes.
    torch.compiler.reset()


def steps(workloads: Sequence[Workload]) -> int:
    """How often `run` calls `advanced`."""
    return sum(len(workload.directions) for workload in workloads)


def measure(
    workload: Workload,
    chosen: Sequence[Contender],
    device: torch.device,
    dtype_name: str,
    limits: ceilings.Ceilings,
    seconds: float,
    advanced: Callable[[str], None],
) -> Iterator[Row]:
    dtype = PRECISIONS[dtype_name].dtype
    exact = exact_results(workload, device, dtype)
    errors: dict[str, Errors] = {}
    runners: dict[str, Runner] = {}
    failures: dict[str, str] = {}
    for contender in chosen:
        with noted(failures, contender.name):
            runner = Runner(contender, workload, device, dtype)
            errors[contender.name] = correctness.measure(runner.results(), exact)
            runners[contender.name] = runner
    for direction in workload.directions:
        calls: dict[str, Call] = {}
        for name, runner in runners.items():
            if runner.can_run(direction):
                with noted(failures, name):
                    call = runner.call(direction)
                    # An epoch is long enough to be its own warm-up.
                    if not workload.is_epoch:
                        call(0)
                    if device.type == "cuda":
                        # A fault on the GPU is that of the contender that runs.
                        torch.cuda.synchronize(device)
                    calls[name] = call
        samples = time_all(calls, workload, device, seconds)
        least = workload.cost(direction)
        moved = least.elements * dtype.itemsize
        for contender in chosen:
            name = contender.name
            row: Row = {**workload.as_row(), "direction": direction, "dtype": dtype_name, "contender": name}
            row["floor_ms"] = limits.floor_milliseconds(moved, least.flops)
            if name in failures:
                yield row | {"failed": failures[name]}
            elif name in calls:
                row |= figures(name, samples, moved, least.flops)
                row |= resources(calls[name], workload, device)
                row |= {"in_l2": runners[name].fits_in_l2()}
                row |= {"output_error": errors[name].output, "gradients_error": errors[name].gradients}
                yield row | {"right": errors[name].right(errors.get(BASELINE), PRECISIONS[dtype_name].floor)}
        advanced(f"{workload}, {direction}")


@contextmanager
def noted(failures: dict[str, str], name: str) -> Iterator[None]:
    """Note why a contender fails, such as torch.compile without a compiler: the failure is a row of the table.

    A contender fails too if the portable backend runs in the place of its kernels.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", f".*{fallback.INSTEAD}", RuntimeWarning)
            yield
    except Exception as error:
        failures[name] = shorten(f"{type(error).__name__}: {error}", 200)


def time_all(
    calls: dict[str, Call], workload: Workload, device: torch.device, seconds: float
) -> dict[str, list[float]]:
    if workload.is_epoch:
        return timing.interleave(calls, 1, 0, device)
    return timing.interleave(calls, choose_rounds(calls, device, seconds), 1, device)


def choose_rounds(calls: dict[str, Call], device: torch.device, seconds: float) -> int:
    """As many rounds as fit into so many seconds, by the time of one."""
    start = time.perf_counter()
    timing.interleave(calls, 0, 1, device)
    return round(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / (time.perf_counter() - start))))


def figures(name: str, samples: dict[str, list[float]], moved: int, flops: int) -> Row:
    """Times and rates; the speed-up's percentiles are those of each round's ratio."""
    times = timing.percentiles(samples[name])
    row: Row = {"ms": times, "rounds": len(samples[name])}
    row |= {"gb_per_s": moved / times.p50 / 1e6, "tflop_per_s": flops / times.p50 / 1e9}
    if BASELINE in samples:
        ratios = [base / own for base, own in zip(samples[BASELINE], samples[name], strict=True)]
        row["speedup"] = timing.percentiles(ratios)
    return row


def resources(call: Call, workload: Workload, device: torch.device) -> Row:
    """The time of the kernels alone, and the peak memory; an epoch has neither: see its step."""
    if workload.is_epoch:
        return {"kernel_ms": None, "peak_mib": None}
    return {
        "kernel_ms": timing.kernel_milliseconds(call) if device.type == "cuda" else None,
        "peak_mib": timing.peak_mebibytes(call, device),
    }
