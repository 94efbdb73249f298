"""The lecture's training, five epochs: fused and by the reference, in bf16 and in float32.

    python3 -m fastconv.bench.tools.visit.training OUT [DATA]

OUT/training.json gets each run when it is done, and a line is printed. DATA is a folder that
`fastconv train --data` would take; without it training is on random pictures, and only its time means something.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import fastconv
from fastconv import training
from fastconv.files import write_atomically
from fastconv.training import data
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.data import Dataset, ImageSet

from ... import results
from . import compilations
from .stage import DEVICE, ON_GPU

RECIPE = training.Recipe() if ON_GPU else training.Recipe(epochs=1, limit=1280)


def main() -> None:
    out, *directory = map(Path, sys.argv[1:])
    compilations.count()
    dataset = data.load(directory[0]) if directory else pictures()
    found: dict[str, Any] = {
        "provenance": results.provenance(DEVICE, "bench/gpu.sh whole"),
        "data": dataset.source,
    }
    for precision in ("bf16", "fp32"):
        for backend in ("auto", "reference"):
            recipe = replace(RECIPE, precision=precision)
            name = f"{backend}, {precision}"
            found[name] = run(recipe, backend, dataset)
            text = json.dumps(found, indent=1)
            write_atomically(out / "training.json", lambda file, text=text: file.write(text.encode()))
            print(f"training, {name}: {found[name]['seconds']:.1f} s, {found[name]['test']}", flush=True)


def run(recipe: training.Recipe, backend: str, dataset: Dataset) -> dict[str, Any]:
    with fastconv.backend(backend), tempfile.TemporaryDirectory() as folder:
        # The first steps compile kernels.
        warm = replace(recipe, epochs=1, limit=256)
        training.train(warm, dataset, DEVICE, Path(folder, "warm"), Silent(), None)
        final = training.train(recipe, dataset, DEVICE, Path(folder, "run"), Silent(), None)
    return {"recipe": asdict(recipe), "history": final.history, "test": final.test, "seconds": final.seconds}


class Silent:
    """An observer that shows nothing."""

    def start(self, checkpoint: Checkpoint) -> None:
        pass

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        pass

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        pass


def pictures() -> Dataset:
    """Random images, as many and as large as CIFAR-10's: only the time of a training on them means something."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.randint(10, (count,), generator=generator))

    return Dataset(images(50_000), images(10_000), data.CIFAR10_CLASSES, "random pictures")


if __name__ == "__main__":
    main()
