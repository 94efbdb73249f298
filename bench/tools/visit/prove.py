"""The first stage: is everything right? With first numbers for planned steps and the lecture's blocks.

    python3 -m fastconv.bench.tools.visit.prove OUT

OUT gets outcomes.jsonl and tests.txt, failed.txt (names of failed tests, for the next stage), sanitizer.txt,
check.jsonl, first_timings.jsonl, and an archive of new kernels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import parts, report
from .stage import HOW_TO_TEST, ON_GPU, PROCESSES, stage

# Processes that share `fastconv check`, which runs beside the tests.
SHARDS = 5 if ON_GPU else 1
TOGETHER_SECONDS, TIMINGS_SECONDS = 95, 35


def main() -> None:
    with stage("prove") as out, tempfile.TemporaryDirectory() as scratch:
        try:
            prove(out, Path(scratch))
        finally:
            show(out, Path(scratch))
        parts.run([parts.program("first_timings", out / "first_timings.jsonl")], TIMINGS_SECONDS)


def prove(out: Path, scratch: Path) -> None:
    selected = ("-m", parts.GPU_TESTS) if ON_GPU else ("-k", "convnext_block and one and row or auto and pairs")
    together = [
        parts.pytest_part(
            "tests",
            out / "outcomes.jsonl",
            PROCESSES,
            *selected,
            *parts.SUITE,
            # A large network takes a minute where others share the cores.
            seconds_each=TOGETHER_SECONDS,
            **HOW_TO_TEST,
        ),
        parts.pytest_part(
            "sanitizer",
            scratch / "sanitizer.jsonl",
            2,
            "-k",
            "sanitizer",
            parts.ROOT / "tests/kernels/test_gpu.py",
            seconds_each=TOGETHER_SECONDS,
            **HOW_TO_TEST,
        ),
        *(
            parts.program("check_shard", scratch, i, SHARDS, name=f"shard-{i}", **parts.ONE_THREAD)
            for i in range(SHARDS)
        ),
    ]
    parts.run(together, TOGETHER_SECONDS, out)


def show(out: Path, scratch: Path) -> None:
    """Print what was found, and join the files of the shards."""
    outcomes = report.read(out / "outcomes.jsonl")
    failed = [outcome["test"] for outcome in outcomes if report.is_failure(outcome)]
    (out / "failed.txt").write_text("".join(f"{test}\n" for test in failed))
    shards = [scratch / f"check-{i}.jsonl" for i in range(SHARDS)]
    (out / "check.jsonl").write_text("".join(shard.read_text() for shard in shards if shard.exists()))
    for i in range(SHARDS):
        # What a shard printed matters only if it found nothing.
        printed = out / f"shard-{i}.txt"
        if not report.read(shards[i]):
            print(f"check, shard {i}, found nothing: {printed.read_text()[-report.LINE :]}")
        printed.unlink(missing_ok=True)
    lines = report.tests(outcomes) + report.properties(report.read(scratch / "sanitizer.jsonl"))
    print("\n".join(lines + report.check(report.read(out / "check.jsonl"))), flush=True)


if __name__ == "__main__":
    main()
