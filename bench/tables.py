"""Results as Markdown: a table for each workload with a row per contender, and what moved between two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from . import workloads
from .contenders import BASELINE
from .results import Move, workload_key
from .suite import Row

COLUMNS: dict[str, Callable[[Row], str]] = {
    "contender": lambda row: row["contender"],
    "ms, p20": lambda row: milliseconds(row["ms"][0]),
    "p50": lambda row: milliseconds(row["ms"][1]),
    "p80": lambda row: milliseconds(row["ms"][2]),
    "speed-up": lambda row: speedup(row),
    "images/s": lambda row: images_per_second(row),
    "kernels, ms": lambda row: optional(row["kernel_ms"], milliseconds),
    "of the floor": lambda row: f"{100 * row['floor_ms'] / row['ms'][1]:.0f} %",
    "GB/s": lambda row: f"{row['gb_per_s']:.3g}",
    "TFLOP/s": lambda row: f"{row['tflop_per_s']:.3g}",
    "peak MiB": lambda row: optional(row["peak_mib"], lambda mib: f"{mib:.0f}"),
    "error": lambda row: optional(row["output_error"], lambda error: f"{error:.1e}"),
    "gradients'": lambda row: optional(row["gradients_error"], lambda error: f"{error:.1e}"),
}


def machine(about: dict[str, Any]) -> str:
    """What a run was measured on, in one line."""
    parts = [about["device"], f"torch {about['torch']}", f"triton {about['triton']}", f"Python {about['python']}"]
    parts.insert(1, f"driver {about['driver']}" if about["driver"] else f"{about['threads']} threads")
    commit = f"commit {about['commit'][:10]}{', changed' if about['dirty'] else ''}" if about["commit"] else ""
    return ", ".join([*parts, about["system"], *([commit] if commit else []), about["date"]])


def title(row: Row) -> str:
    return f"{task(row)}, {size(row)}"


def task(row: Row) -> str:
    """What was timed."""
    return workloads.of_row(row).task(row["direction"])


def size(row: Row) -> str:
    """On what it was timed."""
    return f"{row['channels']} channels, {row['side']} x {row['side']}, batch {row['images']}, {row['dtype']}"


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def optional(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def images_per_second(row: Row) -> str:
    return "-" if workloads.of_row(row).is_epoch else f"{1e3 * row['images'] / row['ms'][1]:.0f}"


def speedup(row: Row) -> str:
    """The median, and the range of the middle three fifths of the rounds; a wrong result has no speed-up."""
    if not row["right"]:
        return "wrong result"
    if "speedup" not in row:
        return "-"
    low, middle, high = row["speedup"]
    return f"{middle:.2f}x" if low == high else f"{middle:.2f}x ({low:.2f} - {high:.2f})"


def every_row(about: dict[str, Any], rows: list[Row]) -> str:
    """All rows, in a table for each workload and direction."""
    parts = [machine(about)]
    for _, group in groupby(rows, key=workload_key):
        members = list(group)
        floor = milliseconds(members[0]["floor_ms"])
        measured = [row for row in members if "failed" not in row]
        parts.append(f"**{title(members[0])}**; floor {floor} ms")
        if measured:
            parts.append(table(COLUMNS, ([cell(row) for cell in COLUMNS.values()] for row in measured)))
        parts += [f"{row['contender']}: {row['failed']}" for row in members if "failed" in row]
    return "\n\n".join(parts) + "\n"


def speedups(rows: list[Row]) -> str:
    """A row for each task, all of one size: eager milliseconds, and the speed-up of each contender."""
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    lines = []
    for _, group in groupby(rows, key=workload_key):
        members = {row["contender"]: row for row in group}
        baseline = members[BASELINE]
        cells = [task(baseline), milliseconds(baseline["ms"][1])]
        for name in contenders[1:]:
            row = members.get(name)
            cells.append("-" if row is None or "failed" in row else speedup(row))
        lines.append(cells)
    return table([size(rows[0]), "eager, ms", *contenders[1:]], lines)


def moved(moves: list[Move], count: int) -> str:
    """A table of what `results.compare` found."""
    found = f"{len(moves)} of {count} rows moved beyond the noise of both runs"
    if not moves:
        return found + "\n"
    lines = [
        [
            title(move.after),
            move.after["contender"],
            milliseconds(move.before["ms"][1]),
            milliseconds(move.after["ms"][1]),
            f"{100 * (move.factor - 1):+.0f} %",
        ]
        for move in sorted(moves, key=lambda move: move.factor)
    ]
    return f"{found}:\n\n{table(['', 'contender', 'before, ms', 'after, ms', 'change'], lines)}\n"


def table(header: Iterable[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table: names to the left, numbers to the right."""
    header = list(header)
    rule = "|".join("---" if i == 0 or name == "contender" else "---:" for i, name in enumerate(header))
    return "\n".join([f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])
