"""Programs that a stage runs, several together, within a time limit."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from . import pytest_outcomes

ROOT = Path(__file__).resolve().parents[3]
# Seconds from the polite signal to the one that no program survives.
GRACE = 5.0
# The environment of parts that run beside others. The CPU computes in float64 what results are compared with, and
# more threads than it has would mostly wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# What pytest selects.
GPU_TESTS = "gpu and not slow"
# Where the tests are that a GPU runs. Networks first: they take longest.
SUITE = tuple(
    ROOT / "tests" / place
    for place in (
        "swapping/test_swapped_networks.py",
        "kernels",
        "operations/test_properties.py",
        "training/test_planned.py",
        "test_graphs.py",
    )
)
MODULES = "fastconv.bench.tools.visit"


class Part(NamedTuple):
    """A program, and the environment variables that it gets beside those of this process."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = MappingProxyType({})


def program(module: str, *arguments: object, name: str = "", **environment: str) -> Part:
    """One of the programs in this folder."""
    return Part(name or module, [sys.executable, "-m", f"{MODULES}.{module}", *map(str, arguments)], environment)


def pytest_part(
    name: str, outcomes: Path, processes: int, *arguments: object, seconds_each: int = 60, **environment: str
) -> Part:
    """pytest with arguments of its own, whose outcomes go to a file as they come."""
    options = ["--rootdir", str(ROOT), "--config-file", str(ROOT / "pyproject.toml")]
    options += ["-p", "no:cacheprovider", "-q", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(processes), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", str(seconds_each)]
    environment |= {"PYTEST_PLUGINS": pytest_outcomes.__name__, pytest_outcomes.VARIABLE: str(outcomes)}
    environment |= ONE_THREAD
    return Part(name, [sys.executable, "-m", "pytest", *options, *map(str, arguments)], environment)


def run(parts: Sequence[Part], seconds: float, folder: Path | None = None) -> None:
    """Run parts together, stop those that take longer, and print how each ended.

    Args:
        folder: gets what each part prints, as NAME.txt; without one it is printed here.
    """
    started = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for part in parts:
            with nullcontext() if folder is None else (folder / f"{part.name}.txt").open("wb") as printed:
                running[part.name] = subprocess.Popen(
                    part.command,
                    stdout=printed,
                    stderr=printed,
                    env={**os.environ, **part.environment},
                    # A group of its own, to be stopped with all that it starts.
                    preexec_fn=os.setpgrp,
                )
        while running and time.monotonic() < started + seconds:
            time.sleep(0.1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    took = time.monotonic() - started
                    print(f"== {name}: exit code {process.returncode} after {took:.0f} s", flush=True)
                    del running[name]
        for name in running:
            print(f"== {name}: stopped at its limit of {seconds:.0f} s", flush=True)
    finally:
        stop(running.values())


def stop(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Terminate programs, and kill those that go on. Ctrl-C would not do: a training would finish its step."""
    for signal_number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 1.0)):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal_number)
        deadline = time.monotonic() + patience
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.1)
