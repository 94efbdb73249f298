"""The second stage: how fast is it? Before that, what failed in the first, with kernels that the host waits for.

    python3 -m fastconv.bench.tools.visit.measure OUT

OUT gets again.jsonl and again.txt, tilings.json, measure.json, and an archive of new kernels. The names of failed
tests are looked for in the luggage.
"""

from __future__ import annotations

from pathlib import Path

from . import parts, report
from .compile_ahead import SHARDS
from .stage import HOW_TO_TEST, LUGGAGE, PROCESSES, stage

AHEAD_SECONDS, TILINGS_SECONDS, BENCHMARKS_SECONDS = 80, 40, 80


def main() -> None:
    with stage("measure") as out:
        ahead = [parts.program("compile_ahead", i, SHARDS, name=f"ahead-{i}") for i in range(SHARDS)]
        failed = failed_tests()
        if failed:
            again = parts.pytest_part(
                "again", out / "again.jsonl", PROCESSES, *failed, **HOW_TO_TEST, CUDA_LAUNCH_BLOCKING="1"
            )
            ahead.append(again)
        parts.run(ahead, AHEAD_SECONDS, out)
        for i in range(SHARDS):
            (out / f"ahead-{i}.txt").unlink()
        if failed:
            print("\n".join(report.tests(report.read(out / "again.jsonl"))), flush=True)
        parts.run([parts.program("tilings", out, **HOW_TO_TEST)], TILINGS_SECONDS)
        parts.run([parts.program("benchmarks", out, "measure")], BENCHMARKS_SECONDS)


def failed_tests() -> list[Path]:
    names = LUGGAGE / "failed.txt"
    return [parts.ROOT / name for name in names.read_text().splitlines()] if names.exists() else []


if __name__ == "__main__":
    main()
