"""The third stage: whole things. The lecture's training, ConvNeXt-T by stages and as a whole, a profile.

    python3 -m fastconv.bench.tools.visit.whole OUT [DATA]

OUT gets training.json, lecture.json, whole.json, profile.txt, and an archive of new kernels.
"""

from __future__ import annotations

import shutil
import sys

from . import parts, report
from .stage import stage

TRAINING_SECONDS, LECTURE_SECONDS, PROFILE_SECONDS, BENCHMARKS_SECONDS = 100, 40, 15, 65


def main() -> None:
    with stage("whole") as out:
        parts.run([parts.program("training", *sys.argv[1:])], TRAINING_SECONDS)
        parts.run([parts.program("lecture", *sys.argv[1:])], LECTURE_SECONDS)
        if profiler := shutil.which("ncu"):
            parts.run([profile(profiler)], PROFILE_SECONDS, out)
            print("\n".join(report.kernels((out / "profile.txt").read_text())), flush=True)
        parts.run([parts.program("benchmarks", out, "whole")], BENCHMARKS_SECONDS)


def profile(profiler: str) -> parts.Part:
    """Print each kernel's time, registers, and shares of the peaks of memory and multiprocessors."""
    metrics = ",".join(report.METRICS)
    options = [profiler, "--csv", "--page", "raw", "--metrics", metrics, "--clock-control", "none"]
    # Only what the program asks for.
    options += ["--profile-from-start", "off"]
    return parts.Part("profile", [*options, *parts.program("profiled").command])


if __name__ == "__main__":
    main()
