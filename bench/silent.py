"""A training that shows nothing: what is timed does not wait for a console."""

from __future__ import annotations

from collections.abc import Sequence

from fastconv.training.checkpoint import Checkpoint


class Silent:
    """An observer of `fastconv.training.loop` that ignores what is reported to it."""

    def start(self, checkpoint: Checkpoint) -> None:
        pass

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        pass

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        pass
