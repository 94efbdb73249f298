"""What `fastconv check` finds: a result for each case, for the trainings, and the verdict on all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from fastconv import machine
from fastconv.accuracy import Error
from fastconv.checking.cases import Case
from fastconv.checking.divergence import Divergence
from fastconv.operations import backends

VERDICTS = ("right", "wrong", "skipped")


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Args:
        backend: the one that ran it, or None if none can.
        verdict: one of VERDICTS.
        reason: why it was skipped, or is wrong.
        errors: those of the output and of each gradient.
    """

    case: Case
    backend: str | None
    verdict: str
    reason: str = ""
    errors: dict[str, Error] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        errors = {
            name: {"ours": finite(e.ours), "pytorch": finite(e.pytorch), "bound": e.bound}
            for name, e in self.errors.items()
        }
        case = {**self.case._asdict(), "options": dict(self.case.options)}
        return {**case, "backend": self.backend, "verdict": self.verdict, "reason": self.reason, "errors": errors}


@dataclass(frozen=True)
class Training:
    """What became of the training: the losses of each step, if it came to an end."""

    verdict: str
    reason: str = ""
    divergence: Divergence | None = None

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"verdict": self.verdict, "reason": self.reason}
        if (found := self.divergence) is not None:
            row |= {"difference": finite(found.difference), "bound": finite(found.bound)}
            for name in ("fused", "reference", "neighbour"):
                row[name] = [finite(loss) for loss in getattr(found, name).tolist()]
        return row


@dataclass(frozen=True)
class Graphs:
    """What became of the training in CUDA graphs."""

    verdict: str
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reason": self.reason}


@dataclass(frozen=True)
class Report:
    device: torch.device
    results: list[Result]
    training: Training
    graphs: Graphs
    seconds: float

    @property
    def all_results(self) -> list[Result | Training | Graphs]:
        return [*self.results, self.training, self.graphs]

    def count(self, verdict: str) -> int:
        return [result.verdict for result in self.all_results].count(verdict)

    @property
    def right(self) -> bool:
        """Nothing is wrong, and something is right."""
        return self.count("wrong") == 0 and self.count("right") > 0

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": "right" if self.right else "wrong",
            **{verdict: self.count(verdict) for verdict in VERDICTS},
            "seconds": self.seconds,
            "versions": machine.versions(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "backend": backends.current(),
            "cases": [result.as_json() for result in self.results],
            "training": self.training.as_json(),
            "graphs": self.graphs.as_json(),
        }


def finite(number: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return number if math.isfinite(number) else None
