"""The rows of a comparison: runs that differ in nothing but their seeds, and what they came to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastconv.training.comparison.reading import Run
from fastconv.training.labels import differences, words

# What the options of a row's name start with where nothing differs.
MODEL = ("width", "depth", "patch")


class Mean(NamedTuple):
    """A mean over seeds, and the standard deviation of the sample; None for a single seed."""

    value: float
    deviation: float | None


def mean(values: Sequence[float]) -> Mean:
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seeds.

    Args:
        name: the options in which the row differs from the others.
        runs: one for each seed, at least one; all have done the same number of epochs.
    """

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """A run for what all have in common."""
        return self.runs[0]

    @property
    def seconds(self) -> Mean:
        """Of training, without evaluations."""
        return mean([run.training_seconds for run in self.runs])

    @property
    def validation(self) -> Mean | None:
        """The accuracy in [0, 1] after the last epoch that is done."""
        return self.curve[-1] if self.curve else None

    @property
    def test(self) -> Mean | None:
        """The accuracy in [0, 1]; None if the runs are not finished."""
        tests = [run.test["test_accuracy"] for run in self.runs if run.test is not None]
        return mean(tests) if tests else None

    @property
    def curve(self) -> list[Mean]:
        """The validation accuracy after each epoch."""
        histories = zip(*(run.history for run in self.runs), strict=True)
        return [mean([metrics["validation_accuracy"] for metrics in epoch]) for epoch in histories]


def compare(runs: Iterable[Run]) -> list[Row]:
    """Put runs into rows, in the order in which they come. A seed that comes again in a row is left out."""
    groups: dict[Any, dict[int, Run]] = {}
    for run in runs:
        groups.setdefault(_all_but_seed(run), {}).setdefault(run.recipe.seed, run)
    rows = [list(group.values()) for group in groups.values()]
    return [Row(name, members) for name, members in zip(_names([row[0] for row in rows]), rows, strict=True)]


def _all_but_seed(run: Run) -> Any:
    recipe, environment = replace(run.recipe, seed=0), run.environment
    epochs = None if run.test is not None else run.epoch
    place = environment.device, environment.backend, _threads(run), environment.processes
    return recipe, place, run.data_checksum, epochs


def _threads(run: Run) -> int | None:
    return run.environment.threads if run.environment.device == "cpu" else None


def _names(firsts: list[Run]) -> list[str]:
    """Return the names of rows, given a run of each."""
    options = differences([replace(run.recipe, seed=0) for run in firsts])
    if not any(options):
        options = [{name: getattr(run.recipe, name) for name in MODEL} for run in firsts]
    names = [[words(each)] if each else [] for each in options]
    checksums = {run.data_checksum for run in firsts}
    for facts in (
        [f"on {run.environment.device}" for run in firsts],
        [f"backend {run.environment.backend}" for run in firsts],
        [f"threads {_threads(run)}" if _threads(run) else "" for run in firsts],
        [f"processes {run.environment.processes}" for run in firsts],
        # The same data may lie elsewhere, and other data may have come to the same place.
        [f"data {Path(run.data).name}, {run.data_checksum[:8]}" if len(checksums) > 1 else "" for run in firsts],
    ):
        if len(set(facts)) > 1:
            for name, fact in zip(names, facts, strict=True):
                name += [fact] if fact else []
    for name, run in zip(names, firsts, strict=True):
        if run.test is None:
            name.append(f"{run.epoch} of {run.recipe.epochs} epochs done")
    return [", ".join(name) for name in names]
