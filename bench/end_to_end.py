"""The lecture's program beside `fastconv train`, end to end, in turns on one machine.

In each round the lecture's program trains for one epoch, and ours for all of its recipe, on the first images of
each set; both evaluate the training images and the validation images after each epoch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastconv import training
from fastconv.training.data import Dataset, split_indices
from fastconv.training.loop import Observer

from . import lecture
from .clock import Clock
from .suite import Row
from .trainings import FASTCONV, LECTURE, LEVEL

EVALUATIONS, COMPUTING = "evaluations", "computing"
# The sets that each part of an epoch goes through: training images, validation images.
SETS = {
    lecture.TRAINING: (1, 0),
    lecture.EVALUATION: (1, 0),
    lecture.VALIDATION: (0, 1),
    EVALUATIONS: (1, 1),
}


def measure(
    dataset: Dataset, device: torch.device, recipe: training.Recipe, rounds: int, advanced: Callable[[str], None]
) -> Iterator[list[Row]]:
    """Yield the rows of each round: the lecture's, then ours.

    Args:
        recipe: ours. The lecture's program uses as many images, and computes in float32.
        advanced: called after each round.
    """
    # The first steps compile and allocate.
    run_lecture(dataset, device, replace(recipe, limit=lecture.BATCH_SIZE))
    run_fastconv(dataset, device, replace(recipe, epochs=1))
    whole = [len(part) for part in split_indices(len(dataset.train), recipe.split_seed)]
    used = [min(count, recipe.limit or count) for count in whole]
    for i in range(rounds):
        rows = [run_lecture(dataset, device, recipe), run_fastconv(dataset, device, recipe)]
        for row in rows:
            row |= {"level": LEVEL, "round": i, "images": used, "of": whole}
            row["scale"] = {
                part: recipe.epochs / row["epochs"] * weighted(SETS[part], whole) / weighted(SETS[part], used)
                for part in row["seconds"]
            }
        yield rows
        advanced(f"round {i + 1}")


def weighted(counts: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def run_lecture(dataset: Dataset, device: torch.device, recipe: training.Recipe) -> Row:
    clock = Clock()
    (metrics,) = lecture.run(dataset.train, len(dataset.classes), device, 1, clock, recipe.limit)
    seconds = {
        part: {
            **{name: clock.seconds[part, name] for name in (lecture.LOADING, lecture.MOVING)},
            COMPUTING: clock.seconds[part,],
        }
        for part in (lecture.TRAINING, lecture.EVALUATION, lecture.VALIDATION)
    }
    return {"contender": LECTURE, "precision": "fp32", "epochs": 1, "seconds": seconds, "metrics": metrics}


def run_fastconv(dataset: Dataset, device: torch.device, recipe: training.Recipe) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        final = training.train(recipe, dataset, device, Path(folder, "checkpoint.pt"), Observer(), None)
    *_, metrics = final.history
    evaluations = metrics["evaluation_seconds"]
    seconds = {
        lecture.TRAINING: {COMPUTING: metrics["seconds"] - evaluations},
        EVALUATIONS: {COMPUTING: evaluations},
    }
    return {
        "contender": FASTCONV,
        "precision": recipe.precision,
        "epochs": recipe.epochs,
        "seconds": seconds,
        "metrics": metrics,
    }
