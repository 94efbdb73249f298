"""A training run in its folder: what every command that trains does alike."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from fastconv.extras import import_extra
from fastconv.training import checkpoint, folder, loop, memory
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.data import Dataset
from fastconv.training.environment import Environment, restore_threads
from fastconv.training.graphed import Graph
from fastconv.training.ranks import ALONE, Ranks
from fastconv.training.recipe import Recipe, check_images
from fastconv.training.records import Records
from fastconv.training.sets import check_count
from fastconv.training.state import State
from fastconv.training.tensorboard import WRITER, TensorBoard


def check_packages(tensorboard: bool) -> None:
    """Raise MissingPackage if a package is not installed that a run needs only once it has begun."""
    for package in ("torchinfo", "matplotlib", *([WRITER] if tensorboard else [])):
        import_extra(package)


def check(recipe: Recipe, dataset: Dataset, device: torch.device, processes: int = 1) -> None:
    """Raise ValueError if a recipe's classifier does not suit the images, or its training the device's memory.

    Args:
        processes: how many share each batch.

    Raises:
        DataError: there are too few images.
    """
    check_count(dataset)
    image_size = dataset.train.images.shape[1:]
    check_images(recipe, image_size)
    memory.check(recipe, image_size, len(dataset.classes), len(dataset.train), device, processes)


def go_on_as_before(before: Environment, device: torch.device, ranks: Ranks = ALONE) -> str | None:
    """Compute with a run's number of threads; return one line on what else has changed since it was saved."""
    if ranks.count == before.processes:
        restore_threads(before.threads, ranks.on_machine, device)
    if not (changes := before.changes(Environment.now(device, ranks.count))):
        return None
    return (
        f"Changed since the run was saved: {', '.join(changes)}. Its weights may differ in the last bits from "
        "those of an uninterrupted run."
    )


def go_on(
    state: State,
    out: Path,
    resumed: Checkpoint | None,
    observer: loop.Observer,
    graph: Graph = "auto",
    tensorboard: bool = False,
) -> Checkpoint:
    """Do a run in its folder, as the only one there, and write its records: `loop.go_on` says what it raises.

    Args:
        out: the folder, which exists.
        resumed: the checkpoint that `state` was made from, if any.
        tensorboard: also write event files for TensorBoard.

    Raises:
        FolderError: another process is in the folder, or was there since `resumed` was read.
    """
    path = out / folder.CHECKPOINT
    if not state.ranks.is_first:
        return loop.go_on(state, path, loop.Observer(), graph)
    with folder.locked(out), ExitStack() as stack:
        if resumed is None:
            folder.check_new(out)
        elif checkpoint.load(path).seconds != resumed.seconds:
            raise folder.FolderError(
                f"another process has gone on with the run in {out} meanwhile; resume it again"
            )
        observers: list[loop.Observer] = [Records(out, state.recipe)]
        if tensorboard:
            observers.append(stack.enter_context(TensorBoard(out)))
        return loop.go_on(state, path, loop.Observers(*observers, observer), graph)
