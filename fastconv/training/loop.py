"""The training loop, which can stop and go on exactly, on data that lives on the device."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from fastconv.machine import keep_freed_memory
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.data import DataError, Dataset, ImageSet, split_indices
from fastconv.training.recipe import Recipe, autocast
from fastconv.training.state import NonFinite, State

# A report makes the host wait for the device.
REPORT_SECONDS = 0.2
SAVE_SECONDS = 30.0
# Ctrl-C, a scheduler's way to stop a job, and a terminal that is closed, which Windows has not.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(Exception):
    """One of STOPPING: the run has been saved and can be resumed. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Observer(Protocol):
    """What a run reports its progress to."""

    def start(self, checkpoint: Checkpoint) -> None:
        """The run is saved and trains from this checkpoint on, its first or the one it was resumed from."""

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        """Steps `step` of `steps` of an epoch, counted from 1, are done. Called a few times per second."""

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        """An epoch and its validation are done; `history` has the metrics of each one so far."""


@dataclass(frozen=True)
class Sets:
    """The images to train, validate and test on, on the training device."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def make_sets(dataset: Dataset, recipe: Recipe, device: torch.device) -> Sets:
    """Split the training images by the recipe.

    Raises:
        DataError: there are too few to validate on.
    """
    count = len(dataset.train)
    # A fifth of them, rounded down.
    if count < 5:
        raise DataError(f"{dataset.source}: {count} training images leave none to validate on; expected 5 or more")
    train, validation = split_indices(count, recipe.split_seed)
    return Sets(
        dataset.train.subset(train[: recipe.limit]).to(device),
        dataset.train.subset(validation[: recipe.limit]).to(device),
        dataset.test.subset(torch.arange(len(dataset.test))[: recipe.limit]).to(device),
    )


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageSet, recipe: Recipe) -> tuple[float, float]:
    """Return the mean loss, and the accuracy in [0, 1], over all images, in batches of the recipe's size.

    Raises:
        NonFinite: the loss is infinite or NaN.
    """
    device = images.images.device
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    model.eval()
    for x, labels in images.batches(recipe.batch_size):
        with autocast(recipe, device):
            logits = model(x)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    model.train()
    mean = loss.item() / len(images)
    if not math.isfinite(mean):
        raise NonFinite(f"the loss of {len(images):,} images in evaluation is {mean}")
    return mean, correct.item() / len(images)


def train(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    path: Path,
    observer: Observer,
    resumed: Checkpoint | None,
) -> Checkpoint:
    """Train by a recipe from the start, or from a checkpoint: `prepare`, then `go_on`, which say more."""
    return go_on(*prepare(recipe, dataset, device, resumed), path, observer)


def prepare(
    recipe: Recipe, dataset: Dataset, device: torch.device, resumed: Checkpoint | None
) -> tuple[State, Sets]:
    """Return a run before its first step, or where it was saved, and its images. Nothing is written.

    Args:
        resumed: a checkpoint to go on from, of the same recipe but for the number of epochs.

    Raises:
        DataError: there are too few images.
        ValueError: the images are too small for the recipe's patches, or huge.
        CheckpointError: `resumed` does not fit the recipe or the data.
    """
    sets = make_sets(dataset, recipe, device)
    return State(recipe, dataset, len(sets.train), device, resumed), sets


def go_on(state: State, sets: Sets, path: Path, observer: Observer) -> Checkpoint:
    """Train until the recipe's last epoch is done, and keep a checkpoint at `path`.

    It is saved at the start, after each epoch, and every half minute; a run that is killed at any moment
    and resumed reaches the weights of one that is not: on a CPU bit for bit, in the same environment.

    Args:
        path: the checkpoint's file.
        observer: what the progress is reported to.

    Returns:
        The final checkpoint, with the metrics on the test set.

    Raises:
        NonFinite: and the checkpoint at `path` is the last one from before.
        Interrupted: one of STOPPING came; the checkpoint is of the last step.
        WriteError: the checkpoint cannot be written; the last one is still there.
    """
    recipe = state.recipe
    keep_freed_memory()
    with interruption() as interrupted:
        observer.start(state.save(path))
        saved = time.monotonic()
        while state.epoch < recipe.epochs:
            epoch_started, first_step, reported = time.monotonic(), state.step, 0.0
            for images, labels in state.rest_of_epoch(sets.train):
                state.train_on(images, labels)
                now = time.monotonic()
                if now - reported > REPORT_SECONDS or state.step == state.steps:
                    state.check_finite()
                    speed = (state.step - first_step) * recipe.batch_size / (now - epoch_started)
                    loss = state.losses[state.step - 1].item()
                    observer.step(state.epoch + 1, state.step, state.steps, loss, speed)
                    reported = now
                if number := interrupted():
                    state.save(path)
                    raise Interrupted(
                        f"interrupted in epoch {state.epoch + 1}, after step {state.step} of {state.steps}", number
                    )
                if now - saved > SAVE_SECONDS:
                    state.save(path)
                    saved = now
            state.end_epoch(*evaluate(state.model, sets.validation, recipe))
            state.save(path)
            saved = time.monotonic()
            observer.epoch(state.history)
            if (number := interrupted()) and state.epoch < recipe.epochs:
                raise Interrupted(f"interrupted after epoch {state.epoch}", number)

    test_loss, test_accuracy = evaluate(state.model, sets.test, recipe)
    state.test = {"test_loss": test_loss, "test_accuracy": test_accuracy}
    return state.save(path)


@contextmanager
def interruption() -> Iterator[Callable[[], int]]:
    """Note the first signal of STOPPING, so that a step is finished; the second acts as it did before.

    A signal that is ignored stays so, as Ctrl-C is for a job in a shell's background. Other threads than the main
    one get no signals.

    Yields:
        A function that returns the noted signal's number, or 0.
    """
    received = 0
    # None is a handler that Python has not set.
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    ours = [number for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)]

    def note(number: int, frame: object) -> None:
        nonlocal received
        received = number
        restore()

    def restore() -> None:
        for number in ours:
            signal.signal(number, handlers[number])

    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, note)
    try:
        yield lambda: received
    finally:
        restore()
