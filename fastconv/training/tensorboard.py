"""What a training run writes for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fastconv.extras import import_extra
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.loop import Observer
from fastconv.training.schedule import rates

# It needs the package tensorboard.
WRITER = "torch.utils.tensorboard"


class TensorBoard(Observer):
    """Writes event files: losses and learning rates of the steps that are reported, and each epoch's metrics.

    Everything is drawn against the number of steps done before it was computed. So an event's step decides whether
    a resumed run computes it again.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def start(self, checkpoint: Checkpoint) -> None:
        self._recipe = checkpoint.recipe
        self._steps = math.ceil(checkpoint.train_images / checkpoint.recipe.batch_size)
        # TensorBoard forgets what a run that was killed has written from there on.
        begin = checkpoint.epoch * self._steps
        self._writer = import_extra(WRITER).SummaryWriter(str(self.folder), purge_step=begin)
        if checkpoint.history:
            self.epoch(checkpoint.history)
        for step, loss in enumerate(checkpoint.losses.tolist(), 1):
            self._step(checkpoint.epoch + 1, step, loss)

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        self._step(epoch, step, loss)

    def _step(self, epoch: int, step: int, loss: float) -> None:
        done = (epoch - 1) * self._steps + step - 1
        rate = rates(self._recipe, epoch - 1, self._steps)[step - 1].item()
        self._writer.add_scalar("step/loss", loss, done)
        self._writer.add_scalar("step/learning_rate", rate, done)

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        metrics = history[-1]
        for name in ("train", "validation"):
            for quantity in ("loss", "accuracy"):
                # Tags of one quantity share a chart's group.
                self._add(f"{quantity}/{name}", metrics[f"{name}_{quantity}"], metrics["epoch"])
        for name in ("seconds", "evaluation_seconds"):
            self._add(f"time/{name}", metrics[name], metrics["epoch"])
        # The writer's own interval is two minutes, which a kill would lose.
        self._writer.flush()

    def finished(self, final: Checkpoint) -> None:
        assert final.test is not None
        for quantity in ("loss", "accuracy"):
            self._add(f"{quantity}/test", final.test[f"test_{quantity}"], final.epoch)

    def _add(self, tag: str, value: float, epoch: float) -> None:
        self._writer.add_scalar(tag, value, int(epoch) * self._steps)
