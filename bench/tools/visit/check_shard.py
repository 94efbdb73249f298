"""A part of `fastconv check`: every n-th case, from the i-th on.

    python3 -m fastconv.bench.tools.visit.check_shard FOLDER I N

FOLDER/check-I.jsonl gets each result as soon as it is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastconv.checking import runner
from fastconv.checking.cases import all_cases

from . import compilations
from .stage import DEVICE, ON_GPU


def main() -> None:
    folder, shard, shards = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    compilations.count()
    with (folder / f"check-{shard}.jsonl").open("w") as kept:
        # A rehearsal without a GPU tries the first of them only.
        cases = all_cases()[: None if ON_GPU else 30]
        runner.run(DEVICE, cases[shard::shards], lambda _: None, kept)


if __name__ == "__main__":
    main()
