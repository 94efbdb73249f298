"""A worker process of a sweep: it loads the data once, and does the runs that it is handed, one after another."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fastconv import machine
from fastconv.extras import MissingPackage
from fastconv.graphs import CaptureError
from fastconv.operations import backends
from fastconv.training import checkpoint, data, folder, loop, runs
from fastconv.training.checkpoint import Checkpoint, CheckpointError
from fastconv.training.data import DataError, Dataset
from fastconv.training.folder import FolderError
from fastconv.training.graphed import Graph
from fastconv.training.recipe import Recipe
from fastconv.training.stepper import NonFinite

# Errors whose message is one line for people.
KNOWN = (
    CheckpointError,
    DataError,
    FolderError,
    NonFinite,
    CaptureError,
    MissingPackage,
    backends.BackendUnavailable,
    OSError,
)


@dataclass(frozen=True)
class Settings:
    """What all runs of a worker have in common.

    Args:
        device: a name that `torch.device` takes.
        backend, graph, tensorboard: as the options of `fastconv train`.
        threads: PyTorch's number of threads in new runs; resumed ones keep theirs.
        data_directory, data_checksum: as in `Plan`.
    """

    device: str
    backend: str
    graph: Graph
    tensorboard: bool
    threads: int
    data_directory: str | None
    data_checksum: str


class Task(NamedTuple):
    """A run to do in a folder, or to go on with if it has a checkpoint."""

    folder: Path
    recipe: Recipe


class Report(NamedTuple):
    """What a worker says.

    Args:
        kind: "ready" for a task; then any number of "progress" and "note", and one of "finished", "failed" and
            "stopped". "failed" without having been ready is of the worker itself.
        part: of the run that is done, for "progress".
        text: one line, for "note" and "failed".
    """

    kind: Literal["ready", "progress", "note", "finished", "failed", "stopped"]
    part: float = 0.0
    text: str = ""


class Reporter(loop.Observer):
    """Reports a run's progress to the sweep's main process."""

    def __init__(self, pipe: Connection, epochs: int) -> None:
        self._pipe, self._epochs = pipe, epochs

    def start(self, checkpoint: Checkpoint) -> None:
        steps = -(-checkpoint.train_images // checkpoint.recipe.batch_size)
        self._progress(checkpoint.epoch + checkpoint.step / steps)

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        self._progress(epoch - 1 + step / steps)

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        self._progress(len(history))

    def _progress(self, epochs: float) -> None:
        report(self._pipe, Report("progress", part=epochs / self._epochs))

    def note(self, text: str) -> None:
        report(self._pipe, Report("note", text=text))


def work(pipe: Connection, settings: Settings) -> None:
    """Do tasks from a pipe, and report on them there, until it hands out None. SIGTERM saves the run and stops.

    Whatever makes a run fail but a loss that is not finite may have left the process in a bad state: it ends, and
    the main process starts another.
    """
    _stop_with_the_main_process()
    try:
        torch.set_num_threads(settings.threads)
        device = torch.device(settings.device)
        backends.force(settings.backend, device)
        dataset = data.load(None if settings.data_directory is None else Path(settings.data_directory))
        if dataset.checksum != settings.data_checksum:
            raise DataError(f"{dataset.source} has changed since the sweep began; put back what was there")
        _warm_up(dataset, device)
    except Exception as error:
        report(pipe, Report("failed", text=_reason(error)))
        return
    # The main process closes the pipe when it ends.
    with suppress(EOFError):
        while True:
            report(pipe, Report("ready"))
            if (task := pipe.recv()) is None:
                return
            torch.set_num_threads(settings.threads)
            try:
                _run(task, dataset, device, settings, pipe)
                report(pipe, Report("finished"))
            except loop.Interrupted:
                report(pipe, Report("stopped"))
                return
            except Exception as error:
                report(pipe, Report("failed", text=_reason(error)))
                if not isinstance(error, NonFinite):
                    return


def _warm_up(dataset: Dataset, device: torch.device) -> None:
    """Do a step of a tiny run. What a process does once, such as to load kernels, is no time of its first run."""
    state = loop.prepare(Recipe(width=4, depth=1, patch=1, batch_size=8, limit=8), dataset, device, None)
    state.train(state.rest_of_epoch()[0])


def _run(task: Task, dataset: Dataset, device: torch.device, settings: Settings, pipe: Connection) -> None:
    reporter = Reporter(pipe, task.recipe.epochs)
    out, resumed = folder.make(task.folder), None
    if (path := out / folder.CHECKPOINT).exists():
        resumed = checkpoint.load(path)
        if resumed.recipe != task.recipe:
            raise FolderError(f"{out} holds a run of another recipe; move it out of the sweep")
        if changed := runs.go_on_as_before(resumed.environment, device):
            reporter.note(changed)
    state = loop.prepare(task.recipe, dataset, device, resumed)
    runs.go_on(state, out, resumed, reporter, settings.graph, settings.tensorboard)


def report(pipe: Connection, found: Report) -> None:
    # Without a main process there is nobody to report to; the run is about to be saved.
    with suppress(OSError):
        pipe.send(found)


def _reason(error: Exception) -> str:
    """Return one line on why something failed; a traceback of what nobody expected goes to standard error."""
    if machine.is_out_of_memory(error):
        return "out of memory; give a smaller --batch-size, --width or --depth"
    if isinstance(error, KNOWN):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _stop_with_the_main_process() -> None:
    """If the main process ends, however it does, stop as by SIGTERM."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
