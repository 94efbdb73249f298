"""The lecture's program beside `fastconv train`, on all images.

    python3 -m fastconv.bench.tools.visit.lecture OUT [DATA]

OUT/lecture.json gets the rows of each round; the table is printed at the end. DATA is as for `training`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ... import end_to_end, results, trainings
from ...suite import Row
from . import compilations
from .stage import DEVICE
from .training import RECIPE, load

ROUNDS = 1


def main() -> None:
    out = Path(sys.argv[1])
    compilations.count()
    dataset = load(sys.argv[2:])
    about = {**results.provenance(DEVICE, "bench/gpu.sh whole"), "data": dataset.source}
    rows: list[Row] = []
    for found in end_to_end.measure(dataset, DEVICE, RECIPE, ROUNDS, lambda _: None):
        rows += found
        results.write(out / "lecture.json", about, rows)
    print(trainings.table(rows), flush=True)


if __name__ == "__main__":
    main()
