"""Runs a planned training step in bf16, and starts the profiler for the first of launches that are alike."""

from __future__ import annotations

import torch

from ..planned import PlannedSteps
from .stage import DEVICE


def main() -> None:
    plan = PlannedSteps(torch.bfloat16, DEVICE).training()
    plan.prepare()
    seen = set()
    for launch, tensors in plan.calls:
        kind = launch.kernel, launch.programs
        if kind in seen:
            launch(*tensors)
            continue
        seen.add(kind)
        torch.cuda.profiler.start()
        launch(*tensors)
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
