"""Timing in turns: on a shared machine only ratios that are measured in turns, within one run, mean anything."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[int], object]

# The least milliseconds of a turn on a GPU, which has as many calls as that needs: events resolve half a
# microsecond.
LEAST_TURN = 1.0
PROFILED_CALLS = 5


class Percentiles(NamedTuple):
    p20: float
    p50: float
    p80: float


def percentiles(samples: Sequence[float]) -> Percentiles:
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Percentiles(*torch.tensor(samples, dtype=torch.float64).quantile(quantiles).tolist())


def interleave(
    calls: Mapping[str, Call], rounds: int, warmup: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Time calls in turns, one turn of each per round.

    A turn is a call that is not timed, then one that is; on a GPU several that are. The first call finds the
    caches as the contender before it left them, but in training a step follows its like. Without warm-up, for
    calls so long that there is time for one only, each call is timed.

    Args:
        calls: functions of a number, by which they rotate through their inputs.
        rounds: timed turns of each call.
        warmup: rounds before those, not timed.

    Returns:
        The milliseconds of a call, for each name and round.
    """
    on_gpu = torch.device(device).type == "cuda"
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for i in range(-warmup, rounds):
        for name, call in calls.items():
            if warmup > 0:
                call(2 * i)
            milliseconds = time_on_gpu(call, 2 * i + 1, repeats[name]) if on_gpu else time_on_cpu(call, 2 * i + 1)
            if i >= 0:
                samples[name].append(milliseconds)
            elif on_gpu:
                repeats[name] = max(1, math.ceil(LEAST_TURN / milliseconds))
    return samples


def time_on_cpu(call: Call, i: int) -> float:
    start = time.perf_counter()
    call(i)
    return (time.perf_counter() - start) * 1e3


def time_on_gpu(call: Call, i: int, repeats: int) -> float:
    """The milliseconds of a call: the longer of host's and GPU's, as the host runs ahead, as in training."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for k in range(repeats):
        call(i + k)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def kernel_milliseconds(call: Call) -> float:
    """The milliseconds of a call's kernels on the GPU, without the gaps between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(PROFILED_CALLS):
            call(i)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / PROFILED_CALLS / 1e3


def peak_mebibytes(call: Call, device: torch.device) -> float | None:
    """The most memory that a call takes above what is held before it, in MiB; None if that cannot be measured.

    A replayed CUDA graph takes none: it holds its memory already.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(0)
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    held = reset_peak_memory()
    if held is None:
        return None
    call(0)
    return max(0, process_memory("VmHWM") - held) / 2**20


def reset_peak_memory() -> int | None:
    """Start measuring peak memory; return what this process holds now, in bytes; None if this is not Linux."""
    try:
        # Freed memory that the allocator still holds would hide the peak to come.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return process_memory("VmRSS")


def process_memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
