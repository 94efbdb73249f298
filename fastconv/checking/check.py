"""Whether fastconv computes the right thing on this machine: every operation and module against float64."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

import torch

from fastconv import accuracy, machine
from fastconv.accuracy import Error
from fastconv.checking import divergence, problems
from fastconv.checking.divergence import Divergence
from fastconv.checking.precisions import PRECISIONS, float32_products
from fastconv.checking.problems import INPUTS, Case
from fastconv.operations import backends, functional

# The interpreter takes up to a second for one.
INTERPRETED_SAMPLES = 2
# A stencil's take a second and a half each, forward and backward.
MOST_INTERPRETED_ROWS = 8
# An error between one and so many bounds may be chance, as one in some hundreds of cases is: so many times as many
# samples tell.
NEAR, NEAR_SAMPLES = 2.0, 8


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Args:
        backend: that ran it, or None if none can.
        verdict: "right", "wrong" or "skipped".
        reason: why it was skipped, or is wrong.
        errors: of the output and of each gradient.
    """

    case: Case
    backend: str | None
    verdict: str
    reason: str = ""
    errors: dict[str, Error] = field(default_factory=dict)

    def worst(self) -> tuple[str, Error]:
        """The tensor whose error is closest to its bound, or farthest beyond."""
        return max(self.errors.items(), key=lambda item: item[1].excess)

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
        told: dict[str, Any] = {"verdict": self.verdict, "reason": self.reason}
        if (found := self.divergence) is not None:
            told |= {"difference": finite(found.difference), "bound": finite(found.bound)}
            for name in ("fused", "reference", "neighbour"):
                told[name] = [finite(loss) for loss in getattr(found, name).tolist()]
        return told


@dataclass(frozen=True)
class Report:
    device: torch.device
    results: list[Result]
    training: Training
    seconds: float

    def count(self, verdict: str) -> int:
        return [*(result.verdict for result in self.results), self.training.verdict].count(verdict)

    @property
    def right(self) -> bool:
        """Nothing is wrong, and something is right."""
        return self.count("wrong") == 0 and self.count("right") > 0

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": "right" if self.right else "wrong",
            "right": self.count("right"),
            "wrong": self.count("wrong"),
            "skipped": self.count("skipped"),
            "seconds": self.seconds,
            "versions": machine.versions(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "backend": backends.current(),
            "cases": [result.as_json() for result in self.results],
            "training": self.training.as_json(),
        }


def finite(number: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return number if math.isfinite(number) else None


def run(
    device: torch.device,
    cases: Sequence[Case],
    advanced: Callable[[str], None],
    kept: IO[str] | None = None,
) -> Report:
    """Try all cases, then train.

    Args:
        advanced: is told what has been done after each case and each step of the training.
        kept: a file that gets each result as soon as it is there, as a line of JSON.

    Raises:
        BackendUnavailable: Triton's interpreter fails whatever the kernel.
    """
    started = time.monotonic()
    check_interpreter(device)
    results = []
    with torch.random.fork_rng(devices=[]):
        for case in cases:
            results.append(examine(case, device))
            keep(results[-1], kept)
            advanced(str(case))
        training = examine_training(device, lambda: advanced("training"))
        keep(training, kept)
    return Report(device, results, training, time.monotonic() - started)


def keep(result: Result | Training, file: IO[str] | None) -> None:
    if file is not None:
        print(json.dumps(result.as_json()), file=file, flush=True)


def steps(cases: Sequence[Case]) -> int:
    """How often `run` tells of an advance."""
    return len(cases) + 3 * divergence.STEPS


def check_interpreter(device: torch.device) -> None:
    """Raise BackendUnavailable if Triton's interpreter is to run the kernels, and cannot run the least of them."""
    if not interprets(backends.current(), device):
        return
    try:
        functional.layer_norm(torch.zeros(1, 1, 1, 1))
    except Exception as error:
        raise backends.BackendUnavailable(
            f"Triton's interpreter fails here ({describe(error)}); it needs NumPy, "
            'and Triton older than 3.7 a NumPy older than 2.4: pip install "numpy<2.4"'
        ) from error


def examine(case: Case, device: torch.device) -> Result:
    """Try a case. Whatever is raised makes it wrong: a check that stops there shows nothing of the rest."""
    backend, reason = choose_backend(case, device)
    if backend is None:
        return Result(case, None, "skipped", reason)
    precision = PRECISIONS[case.precision]

    def sample() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        problem = problems.pose(case)
        return accuracy.compare(
            problem.ours,
            problem.definition,
            list(problem.tensors.values()),
            list(problem.tensors),
            INPUTS[case.given].layout,
            precision.dtype,
            precision.autocast,
            device,
        )

    samples = INTERPRETED_SAMPLES if interprets(backend, device) else accuracy.SAMPLES
    try:
        torch.manual_seed(0)
        with float32_products(precision.matmul), backends.backend(backend):
            result = Result(case, backend, "right", errors=accuracy.measure(sample, precision.floor, samples))
            if 1 < result.worst()[1].excess < NEAR:
                errors = accuracy.measure(sample, precision.floor, NEAR_SAMPLES * samples)
                result = Result(case, backend, "right", errors=errors)
    except Exception as error:
        return Result(case, backend, "wrong", describe(error))
    name, worst = result.worst()
    if worst.right:
        return result
    reason = f"{name}: error {worst.ours:.1e}, PyTorch's {worst.pytorch:.1e}; at most {worst.bound:.1e} is right"
    return replace(result, verdict="wrong", reason=reason)


def examine_training(device: torch.device, stepped: Callable[[], None]) -> Training:
    size = divergence.SMALL if interprets(backends.current(), device) else divergence.LECTURE
    try:
        with float32_products("highest"):
            found = divergence.measure(device, size, stepped)
    except Exception as error:
        return Training("wrong", describe(error))
    if found.right:
        return Training("right", divergence=found)
    reason = f"losses differ by {found.difference:.1e}; at most {found.bound:.1e} is right"
    return Training("wrong", reason, found)


def choose_backend(case: Case, device: torch.device) -> tuple[str | None, str]:
    """The backend that will run a case, or None, and why not."""
    if case.precision == "tf32" and device.type != "cuda":
        return None, "tf32 is a format of GPUs"
    dtype = torch.bfloat16 if PRECISIONS[case.precision].autocast else PRECISIONS[case.precision].dtype
    for name in backends.candidates():
        reason = backends.can_run(name, device, dtype)
        if reason is None and interprets(name, device):
            reason = why_not_interpreted(case, dtype)
        if reason is None:
            return name, ""
    return None, reason or ""


def why_not_interpreted(case: Case, dtype: torch.dtype) -> str | None:
    if dtype == torch.bfloat16:
        return "Triton's interpreter computes with the bits of bfloat16 as if they were integers"
    given = INPUTS[case.given]
    if case.is_stencil and given.images * given.height > MOST_INTERPRETED_ROWS:
        return "Triton's interpreter would take minutes; the tests try its kernels on less"
    return None


def interprets(backend: str, device: torch.device) -> bool:
    return backend == "triton" and device.type == "cpu"


def describe(error: BaseException) -> str:
    """What went wrong first, in one line: Triton's interpreter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
