"""The parts of a visit to a GPU that are Python; bench/gpu.sh calls them one by one, and sets their time limits.

    python -m fastconv.bench.gpu_visit check|benchmarks|convnext|training OUT [DATA]

They need PyTorch and Triton alone. Without a GPU they rehearse on less.
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
from fastconv import check, data, problems, training
from fastconv.checkpoint import write_atomically
from fastconv.data import Dataset, ImageSet

from . import contenders, results, suite, workloads

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RECIPE = training.Recipe() if ON_GPU else training.Recipe(epochs=1, limit=1280)
SECONDS = 1.0
DTYPES = ("float32", "bfloat16")


def write(path: Path, found: dict[str, Any]) -> None:
    text = json.dumps(found, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def run_check(out: Path) -> None:
    """check.json: every result against float64."""
    report = check.run(DEVICE, problems.cases(), lambda _: None)
    write(out / "check.json", report.as_json())
    counts = ", ".join(f"{report.count(verdict)} {verdict}" for verdict in ("right", "wrong", "skipped"))
    print(f"check: {counts} in {report.seconds:.0f} s")
    for result in report.results:
        if result.verdict == "wrong":
            print(f"WRONG {result.case}: {result.reason}")


def run_benchmarks(out: Path) -> None:
    """benchmarks.json: the quick workloads, written after each."""
    about = results.provenance(DEVICE)
    chosen = workloads.quick() if ON_GPU else workloads.quick()[-1:]
    rows: list[suite.Row] = []
    for dtype in DTYPES:
        for found in suite.run(chosen, contenders.choose(DEVICE, quick=True), DEVICE, dtype, SECONDS, print):
            rows += found
            results.write(out / "benchmarks.json", about, rows)


def run_convnext(out: Path) -> None:
    """convnext.json: ConvNeXt-T's stages and the whole models of torchvision and timm, if installed, in bf16."""
    about = results.provenance(DEVICE)
    chosen = [*workloads.convnext(64), *workloads.convnext(256)] if ON_GPU else workloads.convnext(2)[3:4]
    rows: list[suite.Row] = []
    for found in suite.run(chosen, contenders.choose(DEVICE, quick=True), DEVICE, "bfloat16", SECONDS, print):
        rows += found
        results.write(out / "convnext.json", about, rows)


def run_training(out: Path, directory: Path | None) -> None:
    """training.json: five epochs fused, then with the reference, each written when it is done."""
    dataset = pictures() if directory is None else data.load(directory)
    found: dict[str, Any] = {"provenance": results.provenance(DEVICE), "data": dataset.source}
    for backend in ("auto", "reference"):
        for precision in ("fp32", "bf16"):
            recipe = replace(RECIPE, precision=precision)
            with fastconv.backend(backend), tempfile.TemporaryDirectory() as folder:
                # The first steps compile kernels.
                training.train(
                    replace(recipe, epochs=1, limit=256), dataset, DEVICE, Path(folder, "warm"), Silent(), None
                )
                final = training.train(recipe, dataset, DEVICE, Path(folder, "run"), Silent(), None)
            found[f"{backend}, {precision}"] = {
                "recipe": asdict(recipe),
                "history": final.history,
                "test": final.test,
                "seconds": final.seconds,
            }
            write(out / "training.json", found)
            print(f"training, {backend}, {precision}: {final.seconds:.1f} s, {final.test}")


class Silent:
    """An observer that shows nothing."""

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        pass

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        pass


def pictures() -> Dataset:
    """Random images of the number and size of CIFAR-10's: of a training on them only the time means something."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.randint(10, (count,), generator=generator))

    return Dataset(images(50_000), images(10_000), data.CIFAR10_CLASSES, "random pictures")


def main() -> None:
    part, out, *rest = sys.argv[1:]
    if part == "check":
        run_check(Path(out))
    elif part == "benchmarks":
        run_benchmarks(Path(out))
    elif part == "convnext":
        run_convnext(Path(out))
    else:
        run_training(Path(out), Path(rest[0]) if rest else None)


if __name__ == "__main__":
    main()
