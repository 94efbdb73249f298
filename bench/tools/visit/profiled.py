"""Runs the lecture's blocks once, forward and backward in bf16, and starts the profiler for that."""

from __future__ import annotations

import torch

from ...contenders import FASTCONV
from ...runner import Runner
from ...workloads import LECTURE, ConvNextBlock
from .stage import DEVICE


def main() -> None:
    for shape in LECTURE:
        runner = Runner(FASTCONV, ConvNextBlock(128, *shape), DEVICE, torch.bfloat16)
        runner.both(0)
        torch.cuda.profiler.start()
        runner.both(1)
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
