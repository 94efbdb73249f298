"""A run's results as a file: its rows, and the machine, the commit and the command they come from."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from datetime import date
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastconv import machine
from fastconv.files import write_atomically
from fastconv.kernels.cpu import library
from fastconv.operations import backends

from .contenders import BASELINE
from .suite import Row
from .workloads import KINDS

SCHEMA = 1
FOLDER = Path(__file__).resolve().with_name("results")
# The environment variable that may hold what `git describe --always --exclude='*' --abbrev=40 --dirty` prints.
COMMIT, CHANGED = "FASTCONV_COMMIT", "-dirty"
# The fields that identify a row; the others are measured.
WORKLOAD_KEY = ("level", "images", "channels", "side", "direction", "dtype")
KEY = (*WORKLOAD_KEY, "contender")


class ResultsError(ValueError):
    """A file that does not hold results, or results that cannot be compared; the message says why."""


def provenance(device: torch.device, command: str | None = None) -> dict[str, Any]:
    """Where the numbers come from; what cannot be known is None.

    Args:
        command: the command line; by default fastconv, with the arguments of this process.
    """
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "driver": nvidia_smi("driver_version", device) if on_gpu else None,
        # The clocks of multiprocessors and memory when the benchmark starts.
        "clocks": nvidia_smi("clocks.sm,clocks.mem", device) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        **machine.versions(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "compiler": compiler(device),
        **commit(),
        "command": command or shlex.join(["fastconv", *sys.argv[1:]]),
        "date": date.today().isoformat(),
    }


def compiler(device: torch.device) -> str | None:
    """The compiler of the native kernels, if these run."""
    if backends.first_that_can(device, torch.float32) != "native":
        return None
    return library.describe().compiler


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """The commit of the code that runs, and whether files were changed since.

    For a copy, whose .git may be missing or belong to another commit, FASTCONV_COMMIT states both.
    """
    describe = ("git", "-C", str(FOLDER.parent), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty")
    described = os.environ.get(COMMIT) or output_of(*describe)
    if not described:
        return {"commit": None, "dirty": None}
    return {"commit": described.removesuffix(CHANGED), "dirty": described.endswith(CHANGED)}


def nvidia_smi(query: str, device: torch.device) -> str | None:
    number = str(torch.cuda.get_device_properties(device).uuid)
    return output_of("nvidia-smi", f"--id=GPU-{number}", f"--query-gpu={query}", "--format=csv,noheader")


def output_of(*command: str) -> str | None:
    """What a command prints; None if it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def default_path(about: dict[str, Any], within: str = "") -> Path:
    """<device>-<torch>-<date>.json, in the repository's folder of results, or here if this is not a clone.

    If that file exists, its name ends in -2, -3 and so on.

    Args:
        within: a folder inside that of results.
    """
    name = f"{about['device']}-{about['torch']}-{about['date']}"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()
    folder = FOLDER / within if FOLDER.is_dir() else Path()
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(path for suffix in suffixes if not (path := folder / f"{name}{suffix}.json").exists())


def write(path: Path, about: dict[str, Any], rows: list[Row]) -> None:
    """Write one row a line, so that diffs are readable."""
    lines = ",\n".join(json.dumps(rounded(row), allow_nan=False) for row in rows)
    header = f'"schema": {SCHEMA}, "provenance": {json.dumps(about, indent=1, allow_nan=False)}'
    text = f'{{{header}, "rows": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def rounded(value: Any) -> Any:
    """A value with four digits of each number; None for NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if value - value == 0 else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def read(path: Path, levels: Collection[str] = KINDS.keys()) -> tuple[dict[str, Any], list[Row]]:
    """The provenance and the rows of a file.

    Raises:
        ResultsError: the file cannot be read, `write` did not write it, or it has rows of other levels.
    """
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise ResultsError(f"{path} has schema {found['schema']}; this version reads {SCHEMA}")
        if unknown := {row["level"] for row in found["rows"]} - set(levels):
            raise ResultsError(
                f"{path} has workloads {', '.join(sorted(unknown))}; this version knows {', '.join(levels)}: "
                "use the version that wrote it"
            )
        return found["provenance"], found["rows"]
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"{path} holds no results; expected a file that `fastconv bench` wrote") from error


workload_key, key = itemgetter(*WORKLOAD_KEY), itemgetter(*KEY)


class Move(NamedTuple):
    """A row whose time moved beyond the noise of both runs: the old row, and the new."""

    before: Row
    after: Row

    @property
    def factor(self) -> float:
        """How many times as long it takes."""
        return self.after["ms"][1] / self.before["ms"][1]


def compare(before: list[Row], after: list[Row]) -> tuple[list[Move], int]:
    """What moved from one run to another, and how many rows they have in common.

    A row moved if the times between its 20th and 80th percentiles do not overlap. If it has a speed-up over eager
    PyTorch, measured in turns with it, the speed-up must have moved too: a machine that is slower as a whole moves
    nothing. Rows that were measured once are left out, because their noise is unknown.

    Raises:
        ResultsError: the runs have no row in common.
    """
    old = {key(row): row for row in before}
    pairs = [(old[key(row)], row) for row in after if key(row) in old]
    pairs = [(a, b) for a, b in pairs if min(a.get("rounds", 0), b.get("rounds", 0)) > 1]
    if not pairs:
        raise ResultsError("the two files have no workload in common")
    moves = [Move(a, b) for a, b in pairs if apart(a["ms"], b["ms"]) and speedup_moved(a, b)]
    return moves, len(pairs)


def apart(a: list[float], b: list[float]) -> bool:
    return a[2] < b[0] or b[2] < a[0]


def speedup_moved(a: Row, b: Row) -> bool:
    if "speedup" not in a or "speedup" not in b or a["contender"] == BASELINE:
        return True
    return apart(a["speedup"], b["speedup"])
