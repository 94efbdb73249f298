"""Whether the results of a case are right, by the rule of `fastconv.accuracy`.

What is beyond the rule is excused only if rounding the inputs alone would cause as large an error, or if PyTorch
makes it in float32: then the exact result is a difference of numbers that nearly cancel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastconv
from fastconv import accuracy
from fastconv.accuracy import Error
from fastconv.operations import functional, reference
from fuzzing.arguments import LAYOUTS, Case, draw_tensors

SAMPLES = 4
# Computes the result and the gradients of a case from its tensors and the gradient of the result.
Compute = Callable[[Case, dict[str, Tensor | None], Tensor], list[Tensor]]


class Finding(NamedTuple):
    """A tensor beyond the rule.

    Args:
        cancelled: the error that rounding the inputs alone causes, or PyTorch in float32, if that is larger.
    """

    name: str
    error: Error
    cancelled: float

    @property
    def excused(self) -> bool:
        # Nor has a result right digits, half of which moves with the last digits of the inputs, or overflows.
        return self.error.ours <= 2 * self.cancelled or not self.cancelled < 0.5

    def __str__(self) -> str:
        return f"{self.name}: {self.error}; by cancellation {self.cancelled:.1e}"


def judge(case: Case, backend: str, seed: int, index: int) -> list[Finding]:
    """What is beyond the rule in the case of a seed and an index."""

    def measure(samples: int, compute: Compute) -> dict[str, Error]:
        torch.manual_seed(hash((seed, index)) % 2**63)
        return accuracy.measure(lambda: _compare(case, compute), accuracy.FLOOR[case.computed_in], samples)

    # PyTorch's error is infinite or NaN where a result overflows, and where its own zero is not exact.
    def beyond(errors: dict[str, Error]) -> dict[str, Error]:
        return {name: error for name, error in errors.items() if error.excess > 1 and math.isfinite(error.pytorch)}

    ours = functools.partial(_ours, backend)
    found = beyond(measure(SAMPLES, ours))
    if found:
        found = beyond(measure(accuracy.NEAR_SAMPLES * SAMPLES, ours))
    if not found:
        return []
    double, rounded, in_float32 = (
        measure(accuracy.NEAR_SAMPLES * SAMPLES, compute)
        for compute in (
            functools.partial(_from_rounded_inputs, torch.float64),
            functools.partial(_from_rounded_inputs, case.computed_in),
            _in_float32,
        )
    )
    findings = []
    for name, error in found.items():
        cancelled = in_float32[name].ours
        # Rounded constants are no longer constant, and their norm no longer zero.
        if math.isfinite(error.ours):
            cancelled = max(cancelled, rounded[name].ours)
        # float64 itself has no digit right of what is zero but for its rounding.
        if double[name].ours < 1e-3:
            findings.append(Finding(name, error, cancelled))
    return findings


def _compare(case: Case, compute: Compute) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{name: (computed, PyTorch's, exact)} of the result and of each gradient that is asked for."""
    tensors = draw_tensors(case)
    exact_tensors = {name: None if x is None else x.double() for name, x in tensors.items()}
    define = functools.partial(getattr(reference, case.operation), **case.options)
    shape = define(**exact_tensors).shape
    grad = case.values["grad"].draw(shape).to(case.computed_in)
    if grad.dim() == 4:
        grad = LAYOUTS[case.grad_layout](grad)
    exact = _results(case, define, exact_tensors, grad.double())
    computed = compute(case, tensors, grad)
    plain = {name: None if x is None else x.contiguous() for name, x in tensors.items()}
    try:
        with _autocast(case):
            pytorch = _results(case, define, plain, grad.contiguous())
    except RuntimeError:
        # PyTorch's layer norm with a bias in another dtype and no weight.
        pytorch = [torch.full_like(x, torch.nan) for x in computed]
    compared = {}
    for name, mine, other, right in zip(["output", *case.asked], computed, pytorch, exact, strict=True):
        fits = right.numel() == 0 or right.abs().max() <= torch.finfo(other.dtype).max
        compared[name] = mine, (other if fits else torch.full_like(other, torch.nan)).to(mine.dtype), right
    return compared


def _ours(backend: str, case: Case, tensors: dict[str, Tensor | None], grad: Tensor) -> list[Tensor]:
    function = functools.partial(getattr(functional, case.operation), **case.options)
    with fastconv.backend(backend), _autocast(case):
        return _results(case, function, tensors, grad)


def _from_rounded_inputs(
    dtype: torch.dtype, case: Case, tensors: dict[str, Tensor | None], grad: Tensor
) -> list[Tensor]:
    """The exact results of inputs that are moved by up to half a unit in the last place of a dtype."""
    # A generator of its own: the samples stay the same.
    generator = torch.Generator().manual_seed(0)

    def rounded(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        move = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
        return x.double() * (1 + torch.finfo(dtype).eps * move)

    define = functools.partial(getattr(reference, case.operation), **case.options)
    return _results(case, define, {name: rounded(x) for name, x in tensors.items()}, rounded(grad))


def _in_float32(case: Case, tensors: dict[str, Tensor | None], grad: Tensor) -> list[Tensor]:
    """PyTorch's results of the same inputs, computed in float32."""
    define = functools.partial(getattr(reference, case.operation), **case.options)
    wide = {name: None if x is None else x.float().contiguous() for name, x in tensors.items()}
    return _results(case, define, wide, grad.float().contiguous())


def _autocast(case: Case) -> torch.autocast:
    return torch.autocast("cpu", dtype=case.autocast, enabled=case.autocast is not None)


def _results(
    case: Case, function: Callable[..., Tensor], tensors: dict[str, Tensor | None], grad: Tensor
) -> list[Tensor]:
    """The value of a function, and the gradients that are asked for."""
    leaves = {
        name: None if x is None else x.detach().requires_grad_(name in case.asked) for name, x in tensors.items()
    }
    y = function(**leaves)
    if not case.asked:
        return [y.detach()]
    return [y.detach(), *torch.autograd.grad(y, [leaves[name] for name in case.asked], grad.to(y.dtype))]
