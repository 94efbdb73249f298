"""What a training run shows on a console: a progress bar, two lines per epoch, and the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastconv.training import records
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.folder import FILES
from fastconv.training.loop import Observer
from fastconv.training.recipe import Recipe


class Display(Observer):
    """Shows a run on a console.

    Args:
        console: for people; the progress bar, which shows while `bar` is entered, appears only on a terminal.
        recipe: the run's.
        folder: the run's.
        json_output: also print the lines of its metrics, and the result, as JSON on standard output.
    """

    def __init__(self, console: Console, recipe: Recipe, folder: Path, json_output: bool) -> None:
        self.console = console
        self.recipe = recipe
        self.folder = folder
        self.json_output = json_output
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", visible=False, epoch="", note="")

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        self._advance(epoch, step, steps, f"loss {loss:.4f}  {images_per_second:,.0f} images/s  epoch ends in")

    def evaluation(self, epoch: int, done: int, images: int) -> None:
        self._advance(epoch, done, images, "images evaluated; ends in")

    def _advance(self, epoch: int, completed: int, total: int, note: str) -> None:
        shown = f"{epoch}/{self.recipe.epochs}"
        self.bar.update(self.task, completed=completed, total=total, visible=True, epoch=shown, note=note)

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        self.bar.reset(self.task, visible=False)
        last = history[-1]
        for name, label in [("train", "training:"), ("validation", "validation:")]:
            start = f"Epoch {last['epoch']}/{self.recipe.epochs}" if name == "train" else ""
            running = name == "train" and self.recipe.train_metrics == "running"
            self.console.print(
                f"{start:<12}{label:<12}loss {last[f'{name}_loss']:.4f}, "
                f"accuracy {100 * last[f'{name}_accuracy']:.2f} %{', running' if running else ''}"
            )
        if self.json_output:
            print(records.line(last, self.recipe), flush=True)

    def finished(self, final: Checkpoint) -> None:
        assert final.test is not None
        minutes, seconds = divmod(final.seconds, 60)
        self.console.print(
            f"{'Test':<24}loss {final.test['test_loss']:.4f}, "
            f"accuracy {100 * final.test['test_accuracy']:.2f} %\n"
            f"{final.epoch} epochs in {minutes:.0f} min {seconds:04.1f} s, "
            f"of which evaluations took {final.evaluation_seconds:.1f} s\n"
            f"Saved {', '.join(FILES)} in {self.folder}",
            soft_wrap=True,
        )
        if self.json_output:
            times = {"seconds": final.seconds, "evaluation_seconds": final.evaluation_seconds}
            found = {**final.test, **times, "directory": str(self.folder)}
            print(json.dumps(found, allow_nan=False), flush=True)
