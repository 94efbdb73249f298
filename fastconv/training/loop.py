"""The training loop, which can stop and go on exactly, on data that lives on the device."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastconv.machine import keep_freed_memory
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.data import Dataset
from fastconv.training.graphed import Graph
from fastconv.training.ranks import ALONE, Ranks
from fastconv.training.recipe import Recipe
from fastconv.training.sets import make_sets
from fastconv.training.state import State

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


class Observer:
    """What a run reports its progress to; this one does nothing with it."""

    def start(self, checkpoint: Checkpoint) -> None:
        """The run is saved and trains from this checkpoint on, its first or the one it was resumed from."""

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        """Steps `step` of `steps` of an epoch, counted from 1, are done. Called a few times per second."""

    def evaluation(self, epoch: int, done: int, images: int) -> None:
        """After an epoch `done` of `images` images are evaluated. Called a few times per second."""

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        """An epoch and its evaluations are done; `history` has the metrics of each one so far."""

    def note(self, text: str) -> None:
        """One line that the user should know."""

    def finished(self, final: Checkpoint) -> None:
        """The last epoch and the test are done, and saved in this checkpoint."""


class Observers(Observer):
    """Passes everything on to several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def start(self, checkpoint: Checkpoint) -> None:
        for each in self.observers:
            each.start(checkpoint)

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        for each in self.observers:
            each.step(epoch, step, steps, loss, images_per_second)

    def evaluation(self, epoch: int, done: int, images: int) -> None:
        for each in self.observers:
            each.evaluation(epoch, done, images)

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        for each in self.observers:
            each.epoch(history)

    def note(self, text: str) -> None:
        for each in self.observers:
            each.note(text)

    def finished(self, final: Checkpoint) -> None:
        for each in self.observers:
            each.finished(final)


def train(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    path: Path,
    observer: Observer,
    resumed: Checkpoint | None,
    graph: Graph = "auto",
) -> Checkpoint:
    """Train by a recipe from the start, or from a checkpoint: `prepare`, then `go_on`, which say more."""
    return go_on(prepare(recipe, dataset, device, resumed), path, observer, graph)


def prepare(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    resumed: Checkpoint | None,
    ranks: Ranks = ALONE,
) -> State:
    """Return a run before its first step, or where it was saved. Nothing is written.

    Args:
        resumed: a checkpoint to go on from, of the same recipe but for the number of epochs. Any number of
            processes may have written it.
        ranks: the processes of the run, all of which prepare it.

    Raises:
        DataError: there are too few images.
        ValueError: the images are too small for the recipe's patches, or huge.
        CheckpointError: `resumed` does not fit the recipe or the data.
    """
    # Before the clock starts: it belongs to reading the data.
    _ = dataset.checksum
    started = time.monotonic()
    return State(recipe, dataset, make_sets(dataset, recipe, device), started, resumed, ranks)


def go_on(state: State, path: Path, observer: Observer, graph: Graph = "auto") -> Checkpoint:
    """Train until the recipe's last epoch is done, and keep a checkpoint at `path`.

    It is saved at the start, after each epoch, and every half minute; a run that is killed at any moment
    and resumed reaches the weights of one that is not: on a CPU bit for bit, in the same environment.

    Args:
        path: the checkpoint's file.
        observer: what the progress is reported to.
        graph: whether steps are replayed as CUDA graphs, which changes no number: "auto", if they can be.

    Returns:
        The final checkpoint, with the metrics on the test set.

    Raises:
        NonFinite: and the checkpoint at `path` is the last one from before.
        Interrupted: one of STOPPING came; the checkpoint is of the last step.
        WriteError: the checkpoint cannot be written; the last one is still there.
        CaptureError: `graph` is "on", and a step cannot be captured.
    """
    keep_freed_memory()
    with interruption() as interrupted:
        state.choose_steps(graph, observer.note)
        run = _Run(state, path, observer, interrupted)
        observer.start(run.save())
        while state.epoch < state.recipe.epochs:
            run.train_epoch()
            run.evaluate_epoch()
        final = run.test()
    observer.finished(final)
    return final


class Lookout:
    """When the host looks up from its steps: to note a signal, to report and to save.

    All processes of a run do it after the same step, and find the same. To agree takes them a message; so several
    do it only about as often as there is something to report.

    Args:
        interrupted: returns the number of a signal that has come, or 0.

    Attributes:
        reports, saves: whether it is time to.
    """

    def __init__(self, ranks: Ranks, interrupted: Callable[[], int]) -> None:
        self._ranks, self._interrupted = ranks, interrupted
        self._signal, self.reports, self.saves = 0, False, False
        self._reported = self._saved = self._looked = time.monotonic()
        self._steps, self._pause = 0, 1

    def looks_up(self, needed: bool = False) -> bool:
        """Whether to look up after a step; `needed` says that it must be."""
        self._steps += 1
        if self._steps < self._pause and not needed:
            return False
        now = time.monotonic()
        reports, saves = now - self._reported > REPORT_SECONDS, now - self._saved > SAVE_SECONDS
        pause = 1
        if self._ranks.count > 1:
            pause = max(1, int(REPORT_SECONDS * self._steps / max(now - self._looked, 1e-6)))
        if not self._ranks.is_first:
            # It has the clock.
            reports, saves, pause = False, False, 0
        found = self._ranks.largest(self._interrupted(), reports, saves, pause)
        self._signal, self.reports, self.saves, self._pause = found[0], bool(found[1]), bool(found[2]), found[3]
        self._looked, self._steps = now, 0
        return True

    @property
    def signal(self) -> int:
        """The number of a signal that has come: to any process, when they last looked up; or 0."""
        return self._interrupted() if self._ranks.count == 1 else self._signal

    def begin(self) -> None:
        """Report after the next step."""
        self._reported = 0.0

    def reported(self) -> None:
        self._reported = time.monotonic()

    def saved(self) -> None:
        self._saved = time.monotonic()


class _Run:
    """What `go_on` does, and what it looks at a few times per second meanwhile."""

    def __init__(self, state: State, path: Path, observer: Observer, interrupted: Callable[[], int]) -> None:
        self.state, self.path, self.observer = state, path, observer
        self.lookout = Lookout(state.ranks, interrupted)

    def save(self) -> Checkpoint:
        checkpoint = self.state.save(self.path)
        self.lookout.saved()
        return checkpoint

    def save_if_needed(self, where: str) -> None:
        """Save every half minute; and if a signal has come, and then raise Interrupted."""
        if number := self.lookout.signal:
            self.save()
            raise Interrupted(f"interrupted {where}", number)
        if self.lookout.saves:
            self.save()

    def train_epoch(self) -> None:
        """Do the steps of the epoch that are still to come."""
        state, epoch = self.state, self.state.epoch + 1
        started, first_step = time.monotonic(), state.step
        self.lookout.begin()
        for size in state.rest_of_epoch():
            state.train(size)
            is_last = state.step == state.steps
            if not self.lookout.looks_up(needed=is_last):
                continue
            if self.lookout.reports or is_last:
                state.gather()
                state.check_finite()
                speed = (state.step - first_step) * state.recipe.batch_size / (time.monotonic() - started)
                loss = state.losses[state.step - 1].item()
                self.observer.step(epoch, state.step, state.steps, loss, speed)
                self.lookout.reported()
            self.save_if_needed(f"in epoch {epoch}, after step {state.step} of {state.steps}")

    def evaluate_epoch(self) -> None:
        """Evaluate what the recipe asks for, and enter the epoch into the history."""
        state = self.state
        images = state.sets.train if state.recipe.train_metrics == "evaluated" else range(0)
        total = len(images) + len(state.sets.validation)
        train = self.evaluate(images, 0, total) if images else state.running_metrics()
        validation = self.evaluate(state.sets.validation, len(images), total)
        state.end_epoch(train, validation)
        self.save()
        self.observer.epoch(state.history)
        self.lookout.looks_up(needed=True)
        if (number := self.lookout.signal) and state.epoch < state.recipe.epochs:
            raise Interrupted(f"interrupted after epoch {state.epoch}", number)

    def test(self) -> Checkpoint:
        images = self.state.sets.test
        loss, accuracy = self.evaluate(images, 0, len(images))
        self.state.test = {"test_loss": loss, "test_accuracy": accuracy}
        return self.save()

    def evaluate(self, images: range, before: int, total: int) -> tuple[float, float]:
        """Loss and accuracy over `images`, which come after the first `before` of `total` to evaluate."""
        epoch = min(self.state.epoch + 1, self.state.recipe.epochs)

        def advanced(done: int) -> None:
            if not self.lookout.looks_up():
                return
            if self.lookout.reports:
                self.observer.evaluation(epoch, before + done, total)
                self.lookout.reported()
            self.save_if_needed(f"in epoch {epoch}, in its evaluation")

        return self.state.evaluate(images, advanced)


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
