"""Side-by-side timing: on a shared machine only ratios measured in turns, within one run, mean anything."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch


class Percentiles(NamedTuple):
    """Milliseconds."""

    p20: float
    p50: float
    p80: float


def interleave(calls: Mapping[str, Callable[[int], object]], rounds: int, warmup: int) -> dict[str, Percentiles]:
    """Time calls in turns, one of each per round.

    A turn is two calls, of which the second is timed: in a training step follows step, and what the first would
    measure is how the contender before it left the caches.

    Args:
        calls: each is given a number, by which to rotate its inputs.
        rounds: how often each is timed.
        warmup: rounds before that, not timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-warmup, rounds):
        for name, call in calls.items():
            call(2 * i)
            start = time.perf_counter()
            call(2 * i + 1)
            elapsed = time.perf_counter() - start
            if i >= 0:
                samples[name].append(elapsed * 1e3)
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        name: Percentiles(*torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist())
        for name, times in samples.items()
    }


def reset_peak_memory() -> int | None:
    """Start measuring peak memory; return what this process holds now, in bytes, or None if not on Linux."""
    try:
        # What earlier work freed, but the allocator still holds, must not hide what comes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return _memory("VmRSS")


def peak_memory() -> int:
    """The most memory that this process held since `reset_peak_memory`, in bytes."""
    return _memory("VmHWM")


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def provenance() -> str:
    """What was measured on, in one line."""
    return (
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}, {date.today().isoformat()}"
    )


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
