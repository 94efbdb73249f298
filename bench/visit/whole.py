"""The third stage: whole things. The lecture's training, ConvNeXt-T by stages and as a whole, swapped networks.

    python3 -m fastconv.bench.visit.whole OUT [DATA]

OUT gets training.json, whole.json, swapped.jsonl and swapped.txt, profile.txt, and an archive of new kernels.
"""

from __future__ import annotations

import shutil
import sys

from . import parts, report
from .stage import HOW_TO_TEST, ON_GPU, PROCESSES, stage

TRAINING_SECONDS, BENCHMARKS_SECONDS, SWAPPED_SECONDS, PROFILE_SECONDS = 60, 65, 40, 15


def main() -> None:
    with stage("whole") as out:
        parts.run([parts.program("training", *sys.argv[1:])], TRAINING_SECONDS)
        parts.run([parts.program("benchmarks", out, "whole")], BENCHMARKS_SECONDS)
        networks = parts.ROOT / "tests/test_swapped_networks.py"
        selected = ("-m", parts.GPU_TESTS) if ON_GPU else ("-k", "auto and pairs")
        try:
            swapped = parts.pytest_part(
                "swapped", out / "swapped.jsonl", PROCESSES, *selected, networks, **HOW_TO_TEST
            )
            parts.run([swapped], SWAPPED_SECONDS, out)
        finally:
            print("\n".join(report.tests(report.read(out / "swapped.jsonl"))), flush=True)
        if profiler := shutil.which("ncu"):
            parts.run([profile(profiler)], PROFILE_SECONDS, out)
            print("\n".join(report.kernels((out / "profile.txt").read_text())), flush=True)


def profile(profiler: str) -> parts.Part:
    """Time, share of the peak of memory and of multiprocessors, and registers, of each kernel."""
    metrics = ",".join(report.METRICS)
    options = [profiler, "--csv", "--page", "raw", "--metrics", metrics, "--clock-control", "none"]
    # Its warm-up is not looked at.
    options += ["--profile-from-start", "off"]
    return parts.Part("profile", [*options, *parts.program("profiled").command])


if __name__ == "__main__":
    main()
