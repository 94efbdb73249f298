"""A picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

from fastconv.extras import import_extra

SETS = {"train": "training", "validation": "validation"}


def plot(history: Sequence[dict[str, float]], file: BinaryIO) -> None:
    """Draw loss and accuracy against the epoch, of training and of validation, as a PNG.

    Args:
        history: the metrics of each epoch, as in `metrics.jsonl`; at least one.
        file: to write to.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure: Any = import_extra("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
    integers = import_extra("matplotlib.ticker").MaxNLocator(integer=True)
    epochs = [metrics["epoch"] for metrics in history]
    panels = [("loss", 1, "cross-entropy loss"), ("accuracy", 100, "accuracy, %")]
    for axes, (quantity, scale, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for prefix, name in SETS.items():
            values = [scale * metrics[f"{prefix}_{quantity}"] for metrics in history]
            axes.plot(epochs, values, marker="o", markersize=4, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(integers)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file, format="png", dpi=120)
