"""The lecture's training in each way to run it: by fastconv and by the reference, eager, compiled, as CUDA graphs.

And the modern recipe's, as far as it generalises in 30 epochs.

    python3 -m fastconv.bench.tools.visit.training OUT [DATA]

OUT/training.json gets each run when it is done, or why it failed, and a line is printed. DATA is a folder that
`fastconv train --data` would take; without it training is on random pictures, and only its time means something.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fastconv
from fastconv import training
from fastconv.checking.graphs import pictures
from fastconv.files import write_atomically
from fastconv.training import data, loop
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.data import Dataset
from fastconv.training.recipe import RECIPES, Precision

from ... import results, suite
from . import compilations
from .stage import DEVICE, ON_GPU

# Without a GPU it is a rehearsal.
LIMIT = None if ON_GPU else 256
# Images of the smaller last batch of CIFAR-10's 40,000 training images, and of 10,000 others.
LAST_BATCHES = (64, 16)

# To train and validate on, and to test on.
CIFAR10_IMAGES = 50_000, 10_000


class Way(NamedTuple):
    """A way to run a training.

    Args:
        backend: "auto" for our kernels, or "reference".
        graph: `loop.go_on`'s.
        compiled: by torch.compile.
    """

    name: str
    backend: str
    graph: Literal["on", "off"]
    compiled: bool = False


FASTCONV_EAGER = Way("fastconv eager", "auto", "off")
FASTCONV_GRAPHED = Way("fastconv graphed", "auto", "on")
EAGER = Way("reference eager", "reference", "off")
GRAPHED = Way("reference graphed", "reference", "on")
COMPILED = Way("reference compiled", "reference", "off", compiled=True)
COMPILED_GRAPHED = Way("reference compiled and graphed", "reference", "on", compiled=True)


class Run(NamedTuple):
    """One training. `base` is the name of its recipe, whose other options it keeps."""

    way: Way
    precision: Precision
    epochs: int
    base: str = "lecture"
    patch: int = 4

    @property
    def name(self) -> str:
        lecture = "" if self.base == "lecture" else f"{self.base}, patch {self.patch}, {self.epochs} epochs, "
        return f"{self.way.name}, {lecture}{self.precision}"

    @property
    def recipe(self) -> training.Recipe:
        options = {"precision": self.precision, "epochs": self.epochs, "patch": self.patch, "limit": LIMIT}
        return replace(RECIPES[self.base], **options)


# The most important first: a visit may be cut short. An epoch of the reference takes ten seconds on an H200, and
# compiling it takes longer.
RUNS = (
    Run(FASTCONV_GRAPHED, "bf16", 5),
    Run(FASTCONV_GRAPHED, "fp32", 5),
    Run(FASTCONV_GRAPHED, "bf16", 30, "modern"),
    Run(FASTCONV_GRAPHED, "bf16", 30, "modern", patch=2),
    Run(EAGER, "bf16", 1),
    Run(GRAPHED, "bf16", 1),
    Run(FASTCONV_EAGER, "bf16", 1),
    Run(COMPILED_GRAPHED, "bf16", 1),
    Run(COMPILED, "bf16", 1),
    Run(EAGER, "fp32", 1),
)


def main() -> None:
    out = Path(sys.argv[1])
    compilations.count()
    dataset = load(sys.argv[2:])
    failures: dict[str, str] = {}
    found: dict[str, Any] = {
        "provenance": results.provenance(DEVICE, "bench/gpu.sh whole"),
        "data": dataset.source,
        "failures": failures,
    }
    for each in RUNS:
        # Without a GPU there are no graphs.
        if not ON_GPU and each.way.graph == "on":
            continue
        name = each.name
        with suite.noted(failures, name):
            took = found[name] = run(each.way, each.recipe, dataset)
            print(f"training, {name}: {each.epochs} epochs in {took['seconds']:.2f} s, {took['test']}", flush=True)
        if name in failures:
            print(f"training, {name}: failed ({failures[name]})", flush=True)
        text = json.dumps(found, indent=1)
        write_atomically(out / "training.json", lambda file, text=text: file.write(text.encode()))


def run(way: Way, recipe: training.Recipe, dataset: Dataset) -> dict[str, Any]:
    """Train once for each size of batch, which compiles kernels, and then for the result."""
    with fastconv.backend(way.backend), tempfile.TemporaryDirectory() as folder:
        for rest in LAST_BATCHES:
            train(way, replace(recipe, epochs=1, limit=recipe.batch_size + rest), dataset, Path(folder, f"{rest}"))
        final = train(way, recipe, dataset, Path(folder, "run"))
    return {"recipe": asdict(recipe), "history": final.history, "test": final.test, "seconds": final.seconds}


def train(way: Way, recipe: training.Recipe, dataset: Dataset, path: Path) -> Checkpoint:
    state = loop.prepare(recipe, dataset, DEVICE, None)
    if way.compiled:
        state.model.compile(dynamic=False)
    return loop.go_on(state, path, loop.Observer(), way.graph)


def load(directory: Sequence[str]) -> Dataset:
    """The data set in a folder, if one is given."""
    # Otherwise only the time of a training means something.
    return data.load(Path(*directory)) if directory else pictures(*CIFAR10_IMAGES)


if __name__ == "__main__":
    main()
