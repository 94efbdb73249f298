"""Compiles the benchmarks of `measure` with torch.compile beforehand, in several processes, into one cache.

    python3 -m fastconv.bench.tools.visit.compile_ahead I N

takes every N-th workload, from the I-th on.
"""

from __future__ import annotations

import sys

from fastconv.checking.precisions import PRECISIONS, float32_products

from ... import suite
from ...runner import Runner
from .benchmarks import series
from .stage import DEVICE, ON_GPU

# How many processes share the work.
SHARDS = 8 if ON_GPU else 1


def main() -> None:
    shard, shards = int(sys.argv[1]), int(sys.argv[2])
    jobs = [(dtype, workload, ways) for dtype, chosen, ways in series("measure") for workload in chosen]
    for dtype, workload, ways in jobs[shard::shards]:
        precision = PRECISIONS[dtype]
        with float32_products(precision.matmul):
            suite.start_compiling()
            for way in ways:
                if way.compile_mode is not None:
                    Runner(way, workload, DEVICE, precision.dtype).warm_up()


if __name__ == "__main__":
    main()
