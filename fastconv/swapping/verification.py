"""Whether a fusion computes what a module does: tried on a probe, in numbers.

Both compute results and gradients in float64, from random parameters, in evaluation and in training; a module is
fused only if they agree.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.operations.backends import backend
from fastconv.swapping.configuration import signature
from fastconv.swapping.fusion import Fusion
from fastconv.swapping.parts import own_random_numbers, with_article
from fastconv.swapping.recognition import Hypotheses, Refusal

# In float64 results differ by the order of sums alone; rounding to float32 in between makes more of a difference.
VERIFIED = 1e-8
ROUNDED = 1e-5


class Verifier:
    """Tries hypotheses, once for all modules that are alike."""

    def __init__(self) -> None:
        self._verified: set[tuple[Any, Fusion]] = set()

    def verify(self, module: nn.Module, found: Hypotheses | Refusal | None) -> Fusion | Refusal | None:
        """The fusion that computes what `module` does, or why none does. A refusal, or None, passes through."""
        if not isinstance(found, Hypotheses):
            return found
        keys = []
        try:
            for fusion in found.fusions:
                keys.append((signature(module, fusion.called), fusion))
                if keys[-1] in self._verified:
                    return fusion
            twin = _twin(module)
        except Exception as error:
            # For example, it holds a lock, a tensor that is no leaf, or a parameter of integers.
            return found.otherwise or Refusal(f"it cannot be copied for a probe: {_brief(error)}")
        verdict = _probe(twin, found.fusions)
        if isinstance(verdict, Refusal):
            return found.otherwise or verdict
        self._verified.add(keys[found.fusions.index(verdict)])
        return verdict


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64 with random parameters, and without hooks, which swapped modules respect when they run."""
    twin = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
    with own_random_numbers(), torch.no_grad():
        for parameter in twin.parameters():
            parameter.uniform_(-1, 1)
    for part in twin.modules():
        for hooks in part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks:
            hooks.clear()
    return twin


def _probe(twin: nn.Module, fusions: list[Fusion]) -> Fusion | Refusal:
    """The first fusion that computes what `twin` does, or why none does."""
    shape = fusions[0].images(twin)
    differences = []
    with own_random_numbers():
        images = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        try:
            own, own_states = _results(twin, twin.forward, images)
        except Exception as error:
            return Refusal(f"its forward does not take maps {shape}: {_brief(error)}")
        for fusion in fusions:
            # Where training takes no random numbers, nothing shows which part would drop paths, and where.
            if fusion.draws and len(set(own_states)) == 1:
                continue
            try:
                ours, states = _results(twin, functools.partial(fusion.compute, twin), images)
            except Exception:
                # The parts do not fit together as in what they are taken for.
                differences.append(math.inf)
                continue
            if states == own_states:
                differences.append(max(map(_relative, own, ours)))
                if differences[-1] <= VERIFIED:
                    return fusion
    if not differences:
        return Refusal("it takes random numbers beside those of its drop path")
    best = min(differences)
    how = f"by {best:.1e}" if math.isfinite(best) else "altogether"
    return Refusal(
        f"it does not compute what its parts suggest: on a probe its results or gradients differ from a "
        f"{fusions[0].kind}'s {how}" + (", as if it rounded to float32" if best < ROUNDED else "")
    )


def _results(
    twin: nn.Module, forward: Callable[[Tensor], Any], images: Tensor
) -> tuple[list[Tensor | None], list[Any]]:
    """What `forward` returns and the gradients of images and parameters; and where random numbers have come to.

    Both in evaluation and in training.
    """
    results: list[Tensor | None] = []
    states = []
    for training in (False, True):
        twin.train(training)
        # All drop the same paths.
        torch.manual_seed(1)
        random.seed(1)
        with backend("reference"):
            y = forward(images)
        states.append((bytes(torch.get_rng_state().tolist()), random.getstate()))
        if not isinstance(y, Tensor):
            raise TypeError(f"it returns {with_article(y)}; expected one tensor")
        grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
        grads = torch.autograd.grad(y, [images, *twin.parameters()], grad, allow_unused=True)
        results += [y.detach(), *grads]
    return results, states


def _relative(own: Tensor | None, ours: Tensor | None) -> float:
    if own is None or ours is None:
        return 0.0 if own is ours else math.inf
    if own.shape != ours.shape:
        return math.inf
    difference = float((ours - own).norm() / own.norm().clamp_min(1e-30))
    # A result that is not finite verifies nothing.
    return difference if math.isfinite(difference) else math.inf


def _brief(error: Exception) -> str:
    return shorten(str(error), 100) or type(error).__name__
