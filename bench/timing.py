"""Side-by-side timing: on a shared machine only ratios measured in turns, within one run, mean anything."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[int], object]

# A turn on a GPU takes at least so many milliseconds, and as many calls as that needs: events resolve half a
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

    A turn is a call that is not timed, then one that is, or several on a GPU: in a training step follows step, and
    what the first would measure is how the contender before it left the caches. Only without warm-up, where calls
    are so long that one is all there is time for, each is timed at once.

    Args:
        calls: each is given a number, by which to rotate its inputs.
        rounds: how many turns of each are timed.
        warmup: rounds before that, not timed.

    Returns:
        Milliseconds of a call, for each name and round.
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
    """The longer of what host and GPU take for a call: the host runs ahead, as in a training step."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for k in range(repeats):
        call(i + k)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def kernel_milliseconds(call: Call) -> float:
    """What the kernels of a call take on the GPU, without the gaps between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(PROFILED_CALLS):
            call(i)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / PROFILED_CALLS / 1e3


def peak_mebibytes(call: Call, device: torch.device) -> float | None:
    """The most memory that a call takes above what is held before it; None where that cannot be known.

    A CUDA graph holds its memory already, and takes none.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(0)
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = reset_peak_memory()
    if before is None:
        return None
    call(0)
    return max(0, process_memory("VmHWM") - before) / 2**20


def reset_peak_memory() -> int | None:
    """Start measuring peak memory; return what this process holds now, in bytes, or None if not on Linux."""
    try:
        # What earlier work freed, but the allocator still holds, must not hide what comes.
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
