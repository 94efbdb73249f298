"""What a sweep shows: how much of its work is done and what is left, and a line for each run that ends."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fastconv.training.comparison import reading
from fastconv.training.comparison.rows import Mean
from fastconv.training.comparison.tables import percent
from fastconv.training.folder import CHECKPOINT
from fastconv.training.sweep import supervisor


class Display(supervisor.Observer):
    """Shows a sweep on a console.

    Args:
        console: for people; bars for the sweep and the runs under way, which show while `bars` is entered, appear
            only on a terminal.
        folder: the sweep's.
        work: what each run costs beside the others, by the names of all.
        done: those that are done already.
        json_output: also print a line of JSON for each run that ends, on standard output.

    Attributes:
        failures: the reasons, by the names of the runs that failed.
    """

    def __init__(
        self, console: Console, folder: Path, work: Mapping[str, float], done: Collection[str], json_output: bool
    ) -> None:
        self.console, self.folder, self.json_output = console, folder, json_output
        self.failures: dict[str, str] = {}
        self._noted: set[str] = set()
        self._estimate = Estimate(work, done)
        self._ended, self._runs = len(done), len(work)
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._sweep = self.bars.add_task("sweep", total=1.0, left="")
        self.bars.update(self._sweep, completed=self._estimate.part)
        self._under_way: dict[str, TaskID] = {}

    def begun(self, name: str, device: str) -> None:
        self._under_way[name] = self.bars.add_task(f"{name} on {device}", total=1.0, left="")

    def progress(self, name: str, part: float) -> None:
        self._estimate.update(name, part)
        self.bars.update(self._under_way[name], completed=part)
        self.bars.update(self._sweep, completed=self._estimate.part, left=self._estimate.left())

    def note(self, text: str) -> None:
        # Every run says why its steps are no CUDA graphs.
        if text not in self._noted:
            self._noted.add(text)
            self.console.print(text, soft_wrap=True)

    def finished(self, name: str) -> None:
        self._estimate.update(name, 1.0)
        run = reading.read(self.folder / name / CHECKPOINT)
        assert run.test is not None
        found = {
            "validation_accuracy": run.history[-1]["validation_accuracy"],
            **run.test,
            "seconds": run.seconds,
            "evaluation_seconds": run.evaluation_seconds,
        }
        accuracies = [percent(Mean(found[f"{each}_accuracy"], None)) for each in ("validation", "test")]
        self._end(name, f"validation {accuracies[0]} %, test {accuracies[1]} %, {_duration(run.seconds)}", found)

    def failed(self, name: str, reason: str) -> None:
        self._estimate.drop(name)
        self.failures[name] = reason
        self._end(name, f"failed: {reason}", {"failed": reason}, style="red")

    def _end(self, name: str, how: str, found: Mapping[str, object], style: str | None = None) -> None:
        if (task := self._under_way.pop(name, None)) is not None:
            self.bars.remove_task(task)
        self._ended += 1
        left = f"; {left}" if (left := self._estimate.left()) else ""
        self.console.print(f"{self._ended}/{self._runs} {name}: {how}{left}", soft_wrap=True, style=style)
        if self.json_output:
            print(json.dumps({"run": name, **found}, allow_nan=False), flush=True)


class Estimate:
    """How much of the work is done, and when the rest will be, if it goes on as it did.

    Args:
        work: of each run, in any unit.
        done: the runs that are done already.
    """

    def __init__(self, work: Mapping[str, float], done: Collection[str]) -> None:
        self._work = dict(work)
        self._started: float | None = None
        self._parts = {name: float(name in done) for name in work}
        # What other processes have done of them, which says nothing about the time of this one.
        self._before = dict.fromkeys(done, 1.0)

    def update(self, name: str, part: float) -> None:
        """Note how much of a run is done; the first time is when it begins, perhaps from a checkpoint."""
        self._started = self._started or time.monotonic()
        self._before.setdefault(name, part)
        self._parts[name] = part

    def drop(self, name: str) -> None:
        """Leave out what will not be done."""
        self._before[name] = self._parts[name] = 1.0

    @property
    def part(self) -> float:
        """0 to 1."""
        return self._sum(self._parts) / sum(self._work.values())

    def left(self) -> str:
        """Return "about 5 min left", or nothing as long as nothing is known."""
        here = self._sum(self._parts) - self._sum(self._before)
        rest = sum(self._work.values()) - self._sum(self._parts)
        if self._started is None or here <= 0 or rest <= 0:
            return ""
        return f"about {_duration((time.monotonic() - self._started) * rest / here)} left"

    def _sum(self, parts: Mapping[str, float]) -> float:
        return sum(self._work[name] * part for name, part in parts.items())


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"
