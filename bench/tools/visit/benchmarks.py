"""The benchmarks of the stages `measure` and `whole`, timed alone.

    python3 -m fastconv.bench.tools.visit.benchmarks OUT measure|whole

OUT/measure.json or OUT/whole.json gets the rows of each workload as soon as they are there; a line for each
direction is printed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from ... import contenders, results, suite, workloads
from ...contenders import Contender
from ...suite import Row
from ...workloads import LECTURE, ConvNextBlock, Workload
from . import compilations, report
from .stage import DEVICE, ON_GPU

SECONDS = 0.7 if ON_GPU else 0.2


class Series(NamedTuple):
    dtype: str
    workloads: list[Workload]
    contenders: list[Contender]


def series(stage: str) -> list[Series]:
    """What a stage times, the most important first."""
    ways = contenders.choose(DEVICE, quick=True)
    if stage == "whole":
        # PyTorch's compiler would take longer than there is for a whole ConvNeXt.
        ways = [way for way in ways if way.compile_mode is None]
    if not ON_GPU:
        # Where bfloat16 takes a CPU minutes.
        chosen = {"measure": [ConvNextBlock(1, *LECTURE[0])], "whole": workloads.convnext(2)[3:4]}
        return [Series("float32", chosen[stage], ways)]
    if stage == "measure":
        quick = workloads.quick()
        of_lecture = [workload for workload in quick if workload.images == 128]
        return [Series("bfloat16", quick, ways), *(Series(name, of_lecture, ways) for name in ("tf32", "float32"))]
    return [Series("bfloat16", workloads.convnext(64), ways)]


def main() -> None:
    out, stage = Path(sys.argv[1]), sys.argv[2]
    compilations.count()
    about = results.provenance(DEVICE, f"bench/gpu.sh {stage}")
    rows: list[Row] = []
    for dtype, chosen, ways in series(stage):
        for found in suite.run(chosen, ways, DEVICE, dtype, SECONDS, lambda _: None):
            rows += found
            results.write(out / f"{stage}.json", about, rows)
            print("\n".join(report.timings(found)), flush=True)


if __name__ == "__main__":
    main()
