"""Which runs there are in folders, and what their checkpoints say of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastconv.training import checkpoint
from fastconv.training.data import CIFAR10_CLASSES
from fastconv.training.environment import Environment
from fastconv.training.folder import CHECKPOINT, FolderError
from fastconv.training.inputs import printable
from fastconv.training.recipe import Recipe
from fastconv.training.summary import multiplications

# What every comparison writes.
COMPARISON = "compare.csv"


@dataclass(frozen=True)
class Run:
    """What a comparison needs of a checkpoint.

    Args:
        path: the checkpoint's.
        data: for people: where the images are.
        is_cifar10: whether they have its size and its classes.
        parameters: how many the model has.
        multiplications: of one image's forward.
        epoch: epochs done.
        history: the metrics of each.
        test: the metrics on the test set; None if the run is not finished.
        seconds: of the whole run, evaluations included.
        evaluation_seconds: of these.

    The rest is as in `Checkpoint`.
    """

    path: Path
    recipe: Recipe
    environment: Environment
    data: str
    data_checksum: str
    train_images: int
    is_cifar10: bool
    parameters: int
    multiplications: int
    epoch: int
    history: list[dict[str, float]]
    test: dict[str, float] | None
    seconds: float
    evaluation_seconds: float

    @property
    def training_seconds(self) -> float:
        return self.seconds - self.evaluation_seconds


def read(path: Path) -> Run:
    """Return the run of a checkpoint; `checkpoint.load` says what it raises."""
    found = checkpoint.load(path)
    is_cifar10 = (found.classes, found.image_size) == (list(CIFAR10_CLASSES), [3, 32, 32])
    return Run(
        path=path,
        recipe=found.recipe,
        environment=found.environment,
        data=printable(found.data_directory or "CIFAR-10"),
        data_checksum=found.data_checksum,
        train_images=found.train_images,
        is_cifar10=is_cifar10,
        parameters=sum(weight.numel() for weight in found.model.values()),
        multiplications=multiplications(found.recipe, found.image_size, len(found.classes)),
        epoch=found.epoch,
        history=found.history,
        test=found.test,
        seconds=found.seconds,
        evaluation_seconds=found.evaluation_seconds,
    )


def find(paths: Sequence[Path]) -> list[Path]:
    """Return the checkpoints in paths: each a checkpoint, a run's folder, or one that holds such, however deep.

    Comparisons that were written earlier are passed over, so that all folders of `runs` may be named.

    Raises:
        FolderError: there is no run in a path, or in none of them.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            checkpoints = [path]
        elif (path / CHECKPOINT).exists():
            checkpoints = [path / CHECKPOINT]
        else:
            checkpoints = sorted(path.rglob(CHECKPOINT), key=_natural)
        if not checkpoints and not (path / COMPARISON).exists():
            raise _no_run(path)
        # However often it is named.
        found |= {each.resolve(): each for each in checkpoints if each.resolve() not in found}
    if not found:
        raise _no_run(paths[0])
    return list(found.values())


def _no_run(path: Path) -> FolderError:
    return FolderError(f"{path} holds no run; give the folder of a run or of a sweep, or a checkpoint.pt")


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts width-32 before width-128."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]
