"""Times planned training steps whose kernels divide their work otherwise, each in turns with the step as it is.

    python3 -m fastconv.bench.tools.visit.tilings OUT

changes one thing at a time, then what was fastest of each together. OUT/tilings.json gets each as soon as it is
timed, and a line is printed: microseconds of a step in a CUDA graph, those of the step as it is, and the ratio.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastconv.files import write_atomically
from fastconv.kernels.block import tiling as block
from fastconv.kernels.classifier.plan import TrainingPlan
from fastconv.kernels.common.launch import Launch
from fastconv.kernels.head import tiling as head
from fastconv.kernels.optimizer import tiling as optimizer
from fastconv.kernels.patches import tiling as patches
from fastconv.kernels.toeplitz import tiling as toeplitz

from ... import results, suite, timing
from ...runner import capture
from ...timing import Call
from ..planned import LECTURE, PlannedSteps, Sizes
from . import compilations
from .stage import DEVICE, ON_GPU

# A CPU interprets.
SIZES = LECTURE if ON_GPU else Sizes(images=3, side=8, width=2, depth=1, patch=2)
DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32,)
ROUNDS, WARMUP = (20, 2) if ON_GPU else (1, 0)
# Ratios of less are taken for noise.
GAIN = 0.99
# How far the gradient of a parameter may be from that of the step as it is: sums in another order round otherwise.
MOST_APART = {torch.bfloat16: 0.1, torch.float32: 1e-3}


class Constant(NamedTuple):
    """Another value of a module's constant."""

    module: ModuleType
    name: str
    value: int

    def __str__(self) -> str:
        return f"{self.module.__name__.split('.')[-2]} {self.name} {self.value}"


class Warps(NamedTuple):
    """Another `num_warps` of a kernel."""

    kernel: str
    value: int

    def __str__(self) -> str:
        return f"{self.kernel} num_warps {self.value}"


Change = Constant | Warps
# Changes that belong together.
Alternative = Sequence[Change]


def constants(module: ModuleType, name: str, *values: int) -> list[Alternative]:
    return [[Constant(module, name, value)] for value in values]


def warps(kernel: str, *values: int) -> list[Alternative]:
    return [[Warps(kernel, value)] for value in values]


# The alternatives of each thing that can be changed by itself.
CHOICES: list[list[Alternative]] = [
    [
        *constants(block, "LARGEST_TILE", 512, 1024, 4096),
        *constants(block, "MAX_PARTIALS", 64),
        [Constant(block, "LARGEST_TILE", 512), Constant(block, "MAX_PARTIALS", 128)],
        [Constant(block, "LARGEST_TILE", 512), Constant(block, "MAX_PARTIALS", 512)],
    ],
    [*constants(toeplitz, "BLOCK_IMAGES", 16, 32, 128), *constants(toeplitz, "MAX_PARTIALS", 32)],
    constants(patches, "FORWARD_PROGRAMS", 64, 256),
    constants(patches, "BACKWARD_PROGRAMS", 32, 128),
    constants(head, "MAX_PARTIALS", 32, 64),
    [*constants(optimizer, "BLOCK_ROWS", 8, 64), *constants(optimizer, "BLOCK_COLUMNS", 32, 64, 256)],
    constants(optimizer, "BLOCK_ELEMENTS", 256, 1024),
    warps("depthwise_forward", 8),
    warps("norm_mlp_residual", 8),
    warps("norm_mlp_residual_backward", 8),
    warps("depthwise_backward", 4),
    warps("reduce_step", 2, 8),
    warps("head", 1),
]


@contextmanager
def changed(alternative: Alternative) -> Iterator[None]:
    """Plans that are made meanwhile differ by these changes."""
    start = Launch.__init__
    of_kernel = {change.kernel: change.value for change in alternative if isinstance(change, Warps)}

    def start_with_warps(self: Launch, kernel: Any, programs: int, *numbers: float, **values: Any) -> None:
        if (name := kernel.fn.__name__) in of_kernel:
            values["num_warps"] = of_kernel[name]
        start(self, kernel, programs, *numbers, **values)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "__init__", start_with_warps))
        for change in alternative:
            if isinstance(change, Constant):
                stack.enter_context(mock.patch.object(change.module, change.name, change.value))
        yield


def make_plan(steps: PlannedSteps, alternative: Alternative = ()) -> TrainingPlan:
    with changed(alternative):
        return steps.training()


class Candidate:
    """A way to do a step, which has done its first.

    Attributes:
        calls: by name, ways to run it.
    """

    def __init__(self, dtype: torch.dtype, alternative: Alternative = ()) -> None:
        steps = PlannedSteps(dtype, DEVICE, SIZES)
        step = steps.repeated(make_plan(steps, alternative))
        step(0)
        self.gradients = {name: grad.clone() for name, grad in steps.state.views(steps.state.gradients).items()}
        self.calls: dict[str, Call] = {"eager": step}
        if ON_GPU:
            self.calls["in a graph"] = capture(step, 1)

    def distance(self, other: Candidate) -> float:
        """How far the gradient of a parameter is from another's, the farthest, relative to itself."""
        distances = [(grad - other.gradients[name]).norm() / grad.norm() for name, grad in self.gradients.items()]
        farthest = torch.stack(distances).max().item()
        if not math.isfinite(farthest):
            raise ArithmeticError("gradients are not finite")
        return farthest


def main() -> None:
    compilations.count()
    out = Path(sys.argv[1])
    rows: list[dict[str, Any]] = []
    about = results.provenance(DEVICE, "bench/gpu.sh measure")
    for dtype in DTYPES:
        for row in sweep(dtype):
            rows.append(row)
            print(line(row), flush=True)
            text = json.dumps({"provenance": about, "rows": rows}, indent=1, allow_nan=False)
            write_atomically(out / "tilings.json", lambda file, text=text: file.write(text.encode()))


def sweep(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Yield a row for each alternative; a rehearsal has the first of each choice alone."""
    default = Candidate(dtype)
    together: list[Change] = []
    for choice in CHOICES:
        best: Alternative = []
        best_ratio = GAIN
        for alternative in choice if ON_GPU else choice[:1]:
            row = compare(default, dtype, alternative)
            yield row
            if "failed" in row or not row["right"]:
                continue
            ratio = row["ratio"]["in a graph" if ON_GPU else "eager"][1]
            if ratio < best_ratio:
                best, best_ratio = alternative, ratio
        together += best
    if together:
        yield compare(default, dtype, together)


def compare(default: Candidate, dtype: torch.dtype, alternative: Alternative) -> dict[str, Any]:
    """Time an alternative in turns with the step as it is; percentiles are 20, 50, 80."""
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "changes": [str(c) for c in alternative]}
    failures: dict[str, str] = {}
    with suite.noted(failures, "failed"):
        candidate = Candidate(dtype, alternative)
        apart = candidate.distance(default)
        row |= {"apart": apart, "right": apart <= MOST_APART[dtype], "us": {}, "default_us": {}, "ratio": {}}
        for name, call in candidate.calls.items():
            turns = {"default": default.calls[name], "candidate": call}
            samples = timing.interleave(turns, ROUNDS, WARMUP, DEVICE)
            pairs = zip(samples["candidate"], samples["default"], strict=True)
            row["us"][name] = [1e3 * ms for ms in timing.percentiles(samples["candidate"])]
            row["default_us"][name] = [1e3 * ms for ms in timing.percentiles(samples["default"])]
            row["ratio"][name] = timing.percentiles([mine / its for mine, its in pairs])
    return row | failures


def line(row: dict[str, Any]) -> str:
    what = f"{row['dtype']}, {', '.join(row['changes'])}"
    if "failed" in row:
        return f"{what}: failed ({row['failed'][:100]})"
    times = [
        f"{name} {row['us'][name][1]:.4g} us of {row['default_us'][name][1]:.4g} ({ratio[1]:.3f})"
        for name, ratio in row["ratio"].items()
    ]
    wrong = "" if row["right"] else f" WRONG, gradients {row['apart']:.1e} apart"
    return f"{what}: {'; '.join(times)}{wrong}"


if __name__ == "__main__":
    main()
