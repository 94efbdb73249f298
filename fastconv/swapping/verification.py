"""Whether a fusion computes what a module does: tried on probes, in numbers.

Both compute results in evaluation, and results and gradients in training, in float64 and from random parameters. A
module is fused only if they agree; and if in evaluation, in float32, their results also agree on larger maps, more
images, large numbers, NaN and infinity.

All of it happens on the CPU, in copies. The caller gives it a thread of its own, in which no mode is on (autocast,
no_grad, a default device), and whose setting of the backend is nobody else's.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastconv.operations.backends import backend
from fastconv.swapping.configuration import signature
from fastconv.swapping.fusion import Fusion
from fastconv.swapping.parts import with_article
from fastconv.swapping.randomness import PrivateGenerator, Unrepeatable, refuse_other_generators
from fastconv.swapping.recognition import Hypotheses, Refusal

# In float64 results differ by the order of sums alone; rounding to float32 in between makes more of a difference.
VERIFIED = 1e-8
ROUNDED = 1e-5
# In float32 they also differ by rounding, and by much more where a clamp or another branch is at work.
SIMILAR = 1e-3
# Beyond the numbers of float16, at which some blocks clamp what they compute.
LARGE_IMAGES, LARGE_PARAMETERS = 1e6, 1e4


class Verifier:
    """Tries hypotheses, once for all modules that are alike."""

    def __init__(self) -> None:
        self._verified: dict[tuple[Any, Fusion], Fusion] = {}

    def verify(self, module: nn.Module, found: Hypotheses | Refusal | None) -> Fusion | Refusal | None:
        """The fusion that computes what `module` does, or why none does. A refusal, or None, passes through."""
        if not isinstance(found, Hypotheses):
            return found
        keys = []
        try:
            for fusion in found.fusions:
                keys.append((signature(module, fusion.called), fusion))
                if keys[-1] in self._verified:
                    return self._verified[keys[-1]]
            twin = _twin(module)
        except Exception as error:
            # For example, it holds a lock, a tensor that is no leaf, or a parameter of integers.
            return found.otherwise or Refusal(f"it cannot be copied for a probe: {_brief(error)}")
        verdict = _probe(twin, found.fusions)
        if isinstance(verdict, Refusal):
            return found.otherwise or verdict
        follows_input = _follows_input(twin, verdict.images(twin))
        fusion = replace(verdict, follows_input=follows_input)
        self._verified[keys[found.fusions.index(verdict)]] = fusion
        return fusion


class Probe(NamedTuple):
    """What both compute.

    Args:
        images: maps (N, C, H, W).
        what: distinguishes them, in a refusal.
        exact: in float64, and also in training, with gradients; the others take a fraction of its time.
        finite: whether results must be finite; else they must be NaN and infinite in the same places.
        scale: of the parameters.
    """

    images: Tensor
    what: str
    exact: bool = False
    finite: bool = True
    scale: float = 1.0


def _probes(shape: tuple[int, int, int, int]) -> Iterator[Probe]:
    generator = torch.Generator("cpu").manual_seed(0)
    images, channels, height, width = shape

    def draw(images: int = images, height: int = height, width: int = width) -> Tensor:
        size = images, channels, height, width
        return torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")

    yield Probe(draw().double(), "on a probe", exact=True)
    yield Probe(draw(1, 3 * height, 3 * width), "on larger maps")
    yield Probe(draw(8), "on more images")
    maps = draw()
    maps[0, 0, height // 2, width // 2], maps[1, 0, height // 2, width // 2] = math.nan, math.inf
    yield Probe(maps, "on maps with NaN and infinity", finite=False)
    yield Probe(LARGE_IMAGES * (draw() - 0.5), "on large numbers")
    yield Probe(draw(), "with large parameters", scale=LARGE_PARAMETERS)


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64 with random parameters; its parts run without hooks, which swapped modules respect."""
    twin = copy.deepcopy(module).to("cpu", torch.float64).to(memory_format=torch.contiguous_format)
    twin.requires_grad_()
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    for part in twin.modules():
        # What nn.Module calls in the place of hooks and forward: those of all modules are left out, too.
        part._compiled_call_impl = part.forward
    return twin


def _probe(twin: nn.Module, fusions: list[Fusion]) -> Fusion | Refusal:
    """The first fusion that computes what `twin` does, or why none does."""
    for probe in _probes(fusions[0].images(twin)):
        found = _first_that_agrees(twin, fusions, probe)
        if isinstance(found, Refusal):
            return found
        fusions = [found]
    return fusions[0]


def _follows_input(twin: nn.Module, shape: tuple[int, int, int, int]) -> bool:
    """Whether the result is channels_last where the maps are, and contiguous where they are."""
    twin = twin.eval().float()
    maps = torch.ones(shape, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        return all(
            twin.forward(maps.contiguous(memory_format=format)).is_contiguous(memory_format=format)
            for format in (torch.contiguous_format, torch.channels_last)
        )


def _first_that_agrees(twin: nn.Module, fusions: list[Fusion], probe: Probe) -> Fusion | Refusal:
    twin.to(probe.images.dtype)
    if probe.scale != 1:
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(probe.scale)
    try:
        if probe.exact:
            refuse_other_generators(twin.train(), probe.images)
        own, own_states = _results(twin, twin.forward, probe)
    except Unrepeatable as error:
        return Refusal(str(error))
    except Exception as error:
        return Refusal(f"its forward does not take maps {tuple(probe.images.shape)}: {_brief(error)}")
    differences = []
    for fusion in fusions:
        # Where training takes no random numbers, nothing shows which part would drop paths, and where.
        if probe.exact and fusion.draws and len(set(own_states)) == 1:
            continue
        try:
            ours, states = _results(twin, functools.partial(fusion.compute, twin), probe)
        except Exception:
            # The parts do not fit together as in what they are taken for.
            differences.append(math.inf)
            continue
        if states == own_states:
            differences.append(max(_relative(*both, probe.finite) for both in zip(own, ours, strict=True)))
            if differences[-1] <= (VERIFIED if probe.exact else SIMILAR):
                return fusion
    if not differences:
        return Refusal("it takes random numbers beside those of its drop path")
    best = min(differences)
    how = f"by {best:.1e}" if math.isfinite(best) else "altogether"
    return Refusal(
        f"it does not compute what its parts suggest: {probe.what} its results or gradients differ "
        f"from a {fusions[0].kind}'s {how}"
        + (", as if it rounded to float32" if probe.exact and best < ROUNDED else "")
    )


def _results(
    twin: nn.Module, forward: Callable[[Tensor], Any], probe: Probe
) -> tuple[list[Tensor | None], list[bytes]]:
    """What `forward` returns, and where random numbers have come to.

    If the probe is exact, in training too, followed by the gradients of the images and of the parameters.
    """
    results: list[Tensor | None] = []
    states = []
    for training in (False, True) if probe.exact else (False,):
        twin.train(training)
        inputs = [probe.images.requires_grad_(training), *twin.parameters()]
        # All drop the same paths.
        with backend("reference"), torch.set_grad_enabled(training), PrivateGenerator() as private:
            y = forward(probe.images)
        states.append(bytes(private.generator.get_state().tolist()))
        if not isinstance(y, Tensor):
            raise TypeError(f"it returns {with_article(y)}; expected one tensor")
        results.append(y.detach())
        if training:
            grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
            results += torch.autograd.grad(y, inputs, grad, allow_unused=True)
    return results, states


def _relative(own: Tensor | None, ours: Tensor | None, finite: bool) -> float:
    """The norm of the difference over that of `own`; infinite where one is not finite, unless both may be."""
    if own is None or ours is None:
        return 0.0 if own is ours else math.inf
    if own.shape != ours.shape:
        return math.inf
    if not finite:
        same = ~own.isfinite() & ((own == ours) | (own.isnan() & ours.isnan()))
        own, ours = own.masked_fill(same, 0), ours.masked_fill(same, 0)
    dtype = torch.float64
    difference = float((ours - own).norm(dtype=dtype) / own.norm(dtype=dtype).clamp_min(1e-30))
    # A result that is not finite verifies nothing.
    return difference if math.isfinite(difference) else math.inf


def _brief(error: Exception) -> str:
    return shorten(str(error), 100) or type(error).__name__
