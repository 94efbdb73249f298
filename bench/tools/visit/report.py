"""What a stage prints: a line for each finding, for a reader who sees the last 12,000 characters."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import tables
from ...contenders import BASELINE
from ...suite import Row

LINE = 160
MOST_FAILED, MOST_WRONG = 35, 20


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last line that was cut when its process was stopped is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def tests(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """Counts, then a line for each failure."""
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    failed = [f"FAILED {name(outcome)}: {outcome['message']}" for outcome in outcomes if is_failure(outcome)]
    return [f"tests: {listed(counts)}", *cut(failed, MOST_FAILED)]


def is_failure(outcome: dict[str, Any]) -> bool:
    return outcome["outcome"] == "failed"


def name(outcome: dict[str, Any]) -> str:
    return outcome["test"].removeprefix("tests/")


def properties(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """What tests found, or why they failed, a line each."""
    return cut(
        [f"{name(outcome)}: {outcome['outcome']}, {outcome['message']}" for outcome in outcomes], MOST_FAILED
    )


def check(results: Sequence[dict[str, Any]]) -> list[str]:
    """Counts of a check's cases and trainings, then a line for each that is wrong."""
    counts = Counter(result["verdict"] for result in results)
    wrong = [
        f"WRONG {case_name(result)}: {result['reason']}" for result in results if result["verdict"] == "wrong"
    ]
    return [f"check: {listed(counts)}", *cut(wrong, MOST_WRONG)]


def case_name(result: dict[str, Any]) -> str:
    if "subject" not in result:
        return "training"
    return ", ".join([result["subject"], *result["options"].values(), result["precision"], result["given"]])


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"


def cut(lines: Sequence[str], most: int) -> list[str]:
    """At most so many, each of at most LINE characters."""
    shown = [line if len(line) <= LINE else line[: LINE - 3] + "..." for line in lines[:most]]
    return shown if len(lines) <= most else [*shown, f"and {len(lines) - most} more"]


def timings(rows: Sequence[Row]) -> list[str]:
    """A line for each direction of a workload: each contender's microseconds and speed-up."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(tables.title(row), []).append(figure(row))
    return [f"{what}: {'; '.join(figures)}" for what, figures in lines.items()]


def figure(row: Row) -> str:
    if "failed" in row:
        return f"{row['contender']} failed ({row['failed'][:60]})"
    microseconds = f"{row['contender']} {1e3 * row['ms'][1]:.4g} us"
    if not row["right"]:
        return f"{microseconds} WRONG"
    if row["contender"] == BASELINE or "speedup" not in row:
        return microseconds
    return f"{microseconds} ({row['speedup'][1]:.2f}x)"


# Nsight Compute's metrics, and their units here.
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of DRAM's peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of multiprocessors'",
    "launch__registers_per_thread": "registers",
}


def kernels(printed: str) -> list[str]:
    """A line for each kernel of what Nsight Compute prints as CSV, after lines of its own."""
    lines = printed.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return [f"no profile: {printed[-LINE:]}"]
    # The second row holds the units.
    rows = list(csv.DictReader(lines[header:]))[1:]
    return [
        f"{row['Kernel Name']}: " + ", ".join(f"{row[metric]} {what}" for metric, what in METRICS.items())
        for row in rows
    ]
