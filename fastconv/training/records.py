"""What a training run writes for people: its configuration, its metrics, and its curves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastconv.files import write_atomically
from fastconv.training import curves
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.folder import CONFIG, CURVES, METRICS
from fastconv.training.loop import Observer
from fastconv.training.recipe import Recipe


class Records(Observer):
    """Writes config.json at the run's start, metrics.jsonl after each epoch, and curves.png at its end.

    Args:
        folder: where to write.
        recipe: the run's.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe

    def start(self, checkpoint: Checkpoint) -> None:
        # It describes the run's start, so a resumed run keeps it. It is missing if a kill came first.
        if os.path.lexists(self.folder / CONFIG):
            return
        data = ("data_directory", "data_checksum", "classes", "image_size", "train_images")
        config = {
            "recipe": asdict(checkpoint.recipe),
            **asdict(checkpoint.environment),
            **{name: getattr(checkpoint, name) for name in data},
        }
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        write_atomically(self.folder / CONFIG, lambda file: file.write(text.encode()))

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        lines = "".join(line(metrics, self.recipe) + "\n" for metrics in history)
        write_atomically(self.folder / METRICS, lambda file: file.write(lines.encode()))

    def finished(self, final: Checkpoint) -> None:
        # A kill may have come between the last checkpoint and its metrics.
        self.epoch(final.history)
        write_atomically(self.folder / CURVES, lambda file: curves.plot(final.history, file))


def line(metrics: dict[str, float], recipe: Recipe) -> str:
    """Return an epoch's line of metrics.jsonl, without its end."""
    return json.dumps({**metrics, "train_metrics": recipe.train_metrics}, allow_nan=False)
