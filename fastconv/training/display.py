"""What a training run shows: the model, then a progress bar, two lines per epoch, and the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastconv.extras import import_extra
from fastconv.files import write_atomically
from fastconv.operations import reference
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.recipe import Recipe


class Display:
    """Shows a run on a console, and keeps its metrics in a file of one JSON object per line and epoch.

    Args:
        console: for people; the progress bar, which shows while `bar` is entered, appears only on a terminal.
        epochs: the run's number of epochs.
        metrics: the file.
        json_output: also print the lines of the file, on standard output.
    """

    def __init__(self, console: Console, epochs: int, metrics: Path, json_output: bool) -> None:
        self.console = console
        self.epochs = epochs
        self.metrics = metrics
        self.json_output = json_output
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} images/s  epoch ends in"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", visible=False, epoch=0, loss=0.0, speed=0.0)

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        self.bar.update(
            self.task,
            completed=step,
            total=steps,
            visible=True,
            epoch=f"{epoch}/{self.epochs}",
            loss=loss,
            speed=images_per_second,
        )

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        self.bar.reset(self.task, visible=False)
        self.write_metrics(history)
        last = history[-1]
        for name, label in [("train", "training:"), ("validation", "validation:")]:
            start = f"Epoch {last['epoch']}/{self.epochs}" if name == "train" else ""
            self.console.print(
                f"{start:<12}{label:<12}loss {last[f'{name}_loss']:.4f}, "
                f"accuracy {100 * last[f'{name}_accuracy']:.2f} %",
                highlight=False,
            )
        if self.json_output:
            print(json.dumps(last), flush=True)

    def write_metrics(self, history: Sequence[dict[str, float]]) -> None:
        lines = "".join(json.dumps(metrics) + "\n" for metrics in history)
        write_atomically(self.metrics, lambda file: file.write(lines.encode()))

    def finished(self, final: Checkpoint, out: Path) -> None:
        assert final.test is not None
        minutes, seconds = divmod(final.seconds, 60)
        self.console.print(
            f"{'Test':<24}loss {final.test['test_loss']:.4f}, "
            f"accuracy {100 * final.test['test_accuracy']:.2f} %\n"
            f"{final.epoch} epochs in {minutes:.0f} min {seconds:04.1f} s, with validation and test\n"
            f"Saved checkpoint.pt, metrics.jsonl, config.json and curves.png in {out}",
            highlight=False,
            soft_wrap=True,
        )
        if self.json_output:
            print(json.dumps({**final.test, "seconds": final.seconds, "directory": str(out)}), flush=True)


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
