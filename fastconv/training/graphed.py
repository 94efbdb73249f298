"""Steps as CUDA graphs: the host replays a whole step at once instead of launching its kernels one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from fastconv.graphs import WARM_UPS_OF_RANKS, CaptureError, capture, on_side_stream
from fastconv.training.stepper import Stepper

# What `fastconv train --graph` takes.
Graph = Literal["auto", "on", "off"]


def check(graph: Graph, device: torch.device) -> None:
    """Raise ValueError if graphs are asked for on a device that has none."""
    if graph == "on" and device.type != "cuda":
        raise ValueError(f"--graph is on, and {device.type} has no CUDA graphs; leave --graph out")


class GraphedStepper:
    """Another stepper's steps as CUDA graphs, one for each kind of step and each number of images.

    The first steps of a kind run as they are, which compiles kernels and allocates what lasts. The next is
    captured, which runs nothing, and replayed, as are those after it. So each step computes what it would without.

    Args:
        stepper: its steps read and write only memory that stays in place.
        failed: called with the reason if a step cannot be captured; from then on all run as they are.
    """

    def __init__(self, stepper: Stepper, failed: Callable[[str], None]) -> None:
        self.stepper, self._failed = stepper, failed
        self.batches, self.trained, self.evaluated = stepper.batches, stepper.trained, stepper.evaluated
        self._device = stepper.batches.position.device
        self._pool: Any = None
        self._before = 1 if stepper.batches.ranks.count == 1 else WARM_UPS_OF_RANKS
        # How many steps of a kind have been done, and how to do those after the first ones.
        self._done: dict[tuple[str, int], int] = {}
        self._steps: dict[tuple[str, int], Callable[[], None]] = {}
        self._can_capture = True

    def train(self, size: int) -> None:
        self._run("train", self.stepper.train, size)

    def evaluate(self, size: int) -> None:
        self._run("evaluate", self.stepper.evaluate, size)

    def _run(self, kind: str, step: Callable[[int], None], size: int) -> None:
        key = kind, size
        if key in self._steps:
            self._steps[key]()
            return
        with on_side_stream(self._device):
            step(size)
        self._done[key] = self._done.get(key, 0) + 1
        if self._done[key] >= self._before:
            self._steps[key] = partial(self._capture, key, partial(step, size))

    def _capture(self, key: tuple[str, int], step: Callable[[], None]) -> None:
        """Capture a step and replay it, or run it if that fails."""
        if self._can_capture:
            try:
                # All graphs share their memory: one runs at a time.
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                step = capture(step, self._device, warm_ups=0, pool=self._pool)
            except CaptureError as error:
                self._can_capture = False
                self._failed(str(error))
        self._steps[key] = step
        step()


def graphed(stepper: Stepper, graph: Graph, note: Callable[[str], None]) -> Stepper:
    """Return a stepper whose steps are replayed as CUDA graphs if they can be, else the same one.

    Args:
        note: called with the reason if they cannot be.

    Raises:
        CaptureError: `graph` is "on", and there are no graphs; or later, a step cannot be captured.
    """
    device = stepper.batches.position.device

    def failed(reason: str) -> None:
        if graph == "on":
            raise CaptureError(f"{reason}; leave --graph on out")
        note(f"Steps are launched kernel by kernel, not as CUDA graphs: {reason}")

    if graph == "off":
        return stepper
    if device.type != "cuda":
        failed(f"{device.type} has none")
        return stepper
    ranks = stepper.batches.ranks
    if ranks.count > 1 and ranks.backend != "nccl":
        failed(f"messages between the processes go by {ranks.backend}, which takes them through the CPU")
        return stepper
    return GraphedStepper(stepper, failed)
