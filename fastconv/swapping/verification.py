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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastconv.operations.backends import backend
from fastconv.swapping.configuration import signature
from fastconv.swapping.fusion import Fusion
from fastconv.swapping.parts import own_random_numbers, with_article
from fastconv.swapping.recognition import Hypotheses, Refusal

# Both compute the same in float64, but for the order of sums; what is rounded to float32 between differs by more.
VERIFIED = 1e-8
ROUNDED = 1e-5


class Verifier:
    """Tries hypotheses; of modules that are alike only one is tried."""

    def __init__(self) -> None:
        self._verified: set[tuple[Any, Fusion]] = set()

    def verify(self, module: nn.Module, found: Hypotheses | Refusal | None) -> Fusion | Refusal | None:
        """The hypothesis that computes what `module` does, or why none does; what are no hypotheses stays."""
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
            # A tensor that is no leaf, a lock, or a parameter of integers, for example.
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
        for hooks in (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        ):
            hooks.clear()
    return twin


class _Results(NamedTuple):
    """What a forward returns, and the gradients of images and parameters.

    Args:
        random: where random numbers have come to.
        drew: whether any was taken.
    """

    tensors: list[Tensor | None]
    random: tuple[Any, ...]
    drew: bool


class _Trial(NamedTuple):
    difference: float
    reason: str


def _probe(twin: nn.Module, fusions: list[Fusion]) -> Fusion | Refusal:
    """The first fusion that computes what `twin` does, in evaluation and in training."""
    shape = fusions[0].images(twin)
    with own_random_numbers():
        images = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        try:
            evaluated, trained = _in_both_modes(twin, twin.forward, images)
        except Exception as error:
            return Refusal(f"its forward does not take maps {shape}: {_brief(error)}")
        trials = []
        for fusion in fusions:
            # Without random numbers, drop path and anything else that keeps its input are the same.
            if fusion.draws and not trained.drew:
                continue
            trial = _trial(twin, fusion, images, (evaluated, trained))
            if trial.difference <= VERIFIED:
                return fusion
            trials.append(trial)
    return Refusal(min(trials, key=lambda trial: trial.difference).reason)


def _trial(twin: nn.Module, fusion: Fusion, images: Tensor, own: tuple[_Results, _Results]) -> _Trial:
    """How far a fusion is from the twin's own results and gradients, in words, too."""
    try:
        ours = _in_both_modes(twin, functools.partial(fusion.compute, twin), images)
    except Exception:
        # The parts do not fit together as in what they are taken for.
        difference = math.inf
    else:
        if any(a.random != b.random for a, b in zip(own, ours, strict=True)):
            return _Trial(math.inf, "it takes random numbers beside those of its drop path")
        pairs = [zip(a.tensors, b.tensors, strict=True) for a, b in zip(own, ours, strict=True)]
        difference = max(_relative(a, b) for pair in pairs for a, b in pair)
    how = f"by {difference:.1e}" if math.isfinite(difference) else "altogether"
    return _Trial(
        difference,
        f"it does not compute what its parts suggest: on a probe its results or gradients differ from a "
        f"{fusion.kind}'s {how}" + (", as if it rounded to float32" if difference < ROUNDED else ""),
    )


def _in_both_modes(twin: nn.Module, forward: Callable[[Tensor], Any], images: Tensor) -> tuple[_Results, _Results]:
    return _results(twin.eval(), forward, images), _results(twin.train(), forward, images)


def _results(twin: nn.Module, forward: Callable[[Tensor], Any], images: Tensor) -> _Results:
    # All drop the same paths.
    torch.manual_seed(1)
    random.seed(1)
    before = _random_state()
    with backend("reference"):
        y = forward(images)
    after = _random_state()
    if not isinstance(y, Tensor):
        raise TypeError(f"it returns {with_article(y)}; expected one tensor")
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    grads = torch.autograd.grad(y, [images, *twin.parameters()], grad, allow_unused=True)
    return _Results([y.detach(), *grads], after, drew=before != after)


def _random_state() -> tuple[Any, ...]:
    return bytes(torch.get_rng_state().tolist()), random.getstate()


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
