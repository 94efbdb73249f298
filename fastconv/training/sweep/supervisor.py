"""The main process of a sweep: it hands runs to workers, one for each device, and replaces workers that die."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from pathlib import Path

from fastconv.training import loop
from fastconv.training.recipe import Recipe
from fastconv.training.sweep.worker import Report, Settings, Task, work

# How soon a signal is noticed.
POLL_SECONDS = 0.2
# A terminal sends these to all processes of a command. The main process decides what happens then.
OF_TERMINALS = [number for number in loop.STOPPING if number != signal.SIGTERM]


class Observer:
    """What a sweep reports to; this one does nothing with it. Runs go by the names of their folders."""

    def begun(self, name: str, device: str) -> None:
        """A run was handed to a worker."""

    def progress(self, name: str, part: float) -> None:
        """So much of a run is done, 0 to 1; first as it begins, where it may have been resumed."""

    def note(self, text: str) -> None:
        """One line that the user should know."""

    def finished(self, name: str) -> None:
        """A run is done, and its last checkpoint saved."""

    def failed(self, name: str, reason: str) -> None:
        """A run cannot go on."""


class Worker:
    """A worker process, and this end of the pipe to it.

    Attributes:
        task: the name of the run that it does, if any.
        is_ready: whether it has been ready for tasks.
        problem: why it could not get ready, if it has reported that.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.task: str | None = None
        self.is_ready = False
        self.problem = ""
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, settings), daemon=True)
        with _ignored_by_children():
            self.process.start()
        # Else there would be no end of file when the worker dies.
        theirs.close()

    def end(self) -> str:
        """Wait for a process that ends, and return how it did."""
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Supervisor:
    """Does runs on devices until all have ended, or until a signal stops it.

    Args:
        folder: the sweep's.
        runs: recipes, by the names of their folders; those that have a checkpoint are resumed.
        workers: the settings of each worker to have.
        observer: what is reported to.
    """

    def __init__(
        self, folder: Path, runs: Mapping[str, Recipe], workers: Sequence[Settings], observer: Observer
    ) -> None:
        self.folder, self.runs, self.settings, self.observer = folder, runs, workers, observer
        self.waiting = deque(runs)
        self.workers: list[Worker] = []
        self.stopping = False

    def run(self) -> int:
        """Do all runs; return the signal that stopped them, each saved, or 0.

        A second signal acts as it did before, and kills the workers.
        """
        with loop.interruption() as interrupted:
            try:
                for settings in self.settings[: len(self.waiting)]:
                    self.workers.append(Worker(settings))
                while self.workers:
                    ready = connection.wait([worker.pipe for worker in self.workers], POLL_SECONDS)
                    if interrupted() and not self.stopping:
                        self.stop()
                    for worker in [each for each in self.workers if each.pipe in ready]:
                        self.receive(worker)
            except (KeyboardInterrupt, SystemExit):
                for worker in self.workers:
                    worker.process.kill()
                raise
            except Exception:
                self.stop()
                raise
            finally:
                for worker in self.workers:
                    worker.end()
            return interrupted()

    def stop(self) -> None:
        """Let workers save the runs that they do, and end."""
        self.stopping = True
        self.waiting.clear()
        for worker in self.workers:
            worker.process.terminate()

    def receive(self, worker: Worker) -> None:
        """Take one report of a worker, or learn that it has ended."""
        try:
            report: Report = worker.pipe.recv()
        except (EOFError, OSError):
            self.ended(worker)
            return
        name = worker.task
        if report.kind == "note":
            self.observer.note(report.text)
        elif report.kind == "ready":
            worker.is_ready = True
            self.hand_out(worker)
        elif name is None:
            worker.problem = report.text
        elif report.kind == "progress":
            self.observer.progress(name, report.part)
        else:
            worker.task = None
            if report.kind == "finished":
                self.observer.finished(name)
            elif report.kind == "failed":
                self.observer.failed(name, report.text)
            elif not self.stopping:
                self.observer.failed(name, "its worker was stopped by SIGTERM")

    def hand_out(self, worker: Worker) -> None:
        """Give a worker the next run, or let it end."""
        if not self.waiting:
            task = None
        else:
            name = worker.task = self.waiting.popleft()
            task = Task(self.folder / name, self.runs[name])
            self.observer.begun(name, worker.settings.device)
        # If it has ended, the next look at its pipe shows that.
        with suppress(OSError):
            worker.pipe.send(task)

    def ended(self, worker: Worker) -> None:
        """Replace a worker that has ended, if there is something left to do."""
        how = worker.end()
        self.workers.remove(worker)
        if self.stopping:
            return
        if worker.task is not None:
            self.observer.failed(worker.task, f"its worker {how}")
        if not worker.is_ready:
            # Another would not get ready either. The others take its share.
            problem = worker.problem or f"it {how} before it was ready"
            self.observer.note(f"There is no worker on {worker.settings.device}: {problem}")
        elif self.waiting:
            self.workers.append(Worker(worker.settings))
        if not self.workers:
            while self.waiting:
                self.observer.failed(self.waiting.popleft(), "there is no worker left")


@contextmanager
def _ignored_by_children() -> Iterator[None]:
    """Let processes that are started meanwhile ignore the signals of terminals."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in OF_TERMINALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            # None is a handler that Python has not set.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
