"""Whether a contender's results are right: by the rule of `fastconv.accuracy`, beside eager PyTorch's errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastconv import accuracy


class Errors(NamedTuple):
    """Relative errors against float64: the output's, and the root mean square of the gradients'."""

    output: float
    gradients: float

    def right(self, baseline: Errors | None, floor: float) -> bool:
        """Whether both are right beside those of the baseline; if it failed, whether both are within the floor."""
        others = baseline or Errors(0.0, 0.0)
        return all(accuracy.Error(own, other, floor).right for own, other in zip(self, others, strict=True))


def measure(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Errors:
    """The errors of an output and its gradients, all float64, as `Runner.results` returns them."""
    output, *gradients = (
        accuracy.relative((a - b).square().sum().item(), b.square().sum().item())
        for a, b in zip(found, exact, strict=True)
    )
    return Errors(output, math.hypot(*gradients) / math.sqrt(len(gradients)))
