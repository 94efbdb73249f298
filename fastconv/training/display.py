"""What a training run shows: the model, then a progress bar, two lines per epoch, and the result."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastconv.extras import import_extra
from fastconv.files import write_atomically
from fastconv.operations import reference
from fastconv.training import curves
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.folder import CONFIG, CURVES, FILES, METRICS
from fastconv.training.loop import Observer
from fastconv.training.recipe import Recipe


class Display(Observer):
    """Shows a run on a console, and writes what people read of it: configuration, metrics, and curves.

    Args:
        console: for people; the progress bar, which shows while `bar` is entered, appears only on a terminal.
        recipe: the run's.
        folder: where to write; the metrics become a file of one JSON object per line and epoch.
        json_output: also print the lines of that file, on standard output.
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
        self.write_metrics(history)
        last = history[-1]
        for name, label in [("train", "training:"), ("validation", "validation:")]:
            start = f"Epoch {last['epoch']}/{self.recipe.epochs}" if name == "train" else ""
            running = name == "train" and self.recipe.train_metrics == "running"
            self.console.print(
                f"{start:<12}{label:<12}loss {last[f'{name}_loss']:.4f}, "
                f"accuracy {100 * last[f'{name}_accuracy']:.2f} %{', running' if running else ''}"
            )
        if self.json_output:
            print(self._line(last), flush=True)

    def write_metrics(self, history: Sequence[dict[str, float]]) -> None:
        lines = "".join(self._line(metrics) + "\n" for metrics in history)
        write_atomically(self.folder / METRICS, lambda file: file.write(lines.encode()))

    def _line(self, metrics: dict[str, float]) -> str:
        return json.dumps({**metrics, "train_metrics": self.recipe.train_metrics}, allow_nan=False)

    def finished(self, final: Checkpoint) -> None:
        assert final.test is not None
        self.write_metrics(final.history)
        write_atomically(self.folder / CURVES, lambda file: curves.plot(final.history, file))
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


def model_summary(recipe: Recipe, image_size: Sequence[int], classes: int, depth: int) -> str:
    """torchinfo's summary of the layers, which are those of the lecture's model: the fused modules merge them."""
    # It runs the model. On the meta device that takes no memory, however wide the model or large the batch.
    with torch.device("meta"):
        model = reference.Classifier(recipe.width, recipe.depth, recipe.patch, image_size[0], classes)
        images = torch.empty(recipe.batch_size, *image_size)
    return str(
        import_extra("torchinfo").summary(
            model,
            input_data=images,
            device="meta",
            depth=depth,
            col_names=("output_size", "num_params", "mult_adds"),
            col_width=18,
            row_settings=("var_names",),
            verbose=0,
        )
    )
