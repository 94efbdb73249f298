"""Whether a fusion computes what a module does: tried on a probe, in numbers.

Both compute results and gradients in float64, from random parameters, in evaluation and in training; a module is
fused only if they agree.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.operations.backends import backend
from fastconv.swapping.fusion import Fusion, Seen, configuration, hooks_of

# Both compute the same in float64, but for the order of sums; what is rounded to float32 between differs by more.
VERIFIED = 1e-8
ROUNDED = 1e-5
# Attributes that are no module's own: its parts, hooks, and whether it is training.
OF_ANY_MODULE = frozenset(vars(nn.Module()))


class Unsuitable(Exception):
    """A candidate cannot be fused; the message says why."""


# By all that decides what a module computes, how it is fused: of modules that are alike one is tried.
Verified = dict[tuple[Any, ...], Fusion]


def verify(module: nn.Module, fusions: Sequence[Fusion], images: Tensor, verified: Verified) -> Fusion:
    """The first that computes what `module` does, on random images like `images`, with random parameters.

    Raises:
        Unsuitable: none does.
    """
    try:
        key = _signature(module, fusions[0]), *fusions
        twin = None if key in verified else _twin(module)
    except Exception as error:
        # A tensor that is no leaf, a lock, or a parameter of integers, for example.
        raise Unsuitable(f"it cannot be copied for a probe: {_brief(error)}") from error
    if twin is None:
        return verified[key]
    with own_random_numbers():
        images = torch.rand_like(images, dtype=torch.float64).requires_grad_()
        differences = [_difference(twin, fusion, images) for fusion in fusions]
    best = min(differences)
    if not best <= VERIFIED:
        how = f"by {best:.1e}" if math.isfinite(best) else "altogether"
        raise Unsuitable(
            f"it does not compute what its parts suggest: on a probe its results or gradients differ from a "
            f"{fusions[0].kind}'s {how}" + (", as if it rounded to float32" if best < ROUNDED else "")
        )
    fusion = fusions[differences.index(best)]
    verified[key] = replace(fusion, seen=seen(module, fusion))
    return verified[key]


def seen(module: nn.Module, fusion: Fusion) -> tuple[Seen, ...]:
    """What `Fusion.seen` is to be."""
    parts = dict(module.named_modules(remove_duplicate=False))
    names = fusion.fused or [name for name in parts if name and not _is_called(name, fusion)]
    return tuple((tuple(name.split(".")), type(parts[name]), configuration(parts[name])) for name in names)


def _is_called(name: str, fusion: Fusion) -> bool:
    return f"{name}.".startswith(tuple(f"{path}." for path in fusion.called))


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64 with random parameters, and without hooks, which `swap` minds when they run."""
    twin = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
    with own_random_numbers(), torch.no_grad():
        for parameter in twin.parameters():
            parameter.uniform_(-1, 1)
    for part in twin.modules():
        for hooks in hooks_of(part):
            hooks.clear()
    return twin


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """The same ones every time, of PyTorch and of Python; the caller's go on afterwards."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            yield
    finally:
        random.setstate(state)


def _signature(module: nn.Module, fusion: Fusion) -> tuple[Any, ...]:
    """All that decides what a module computes but the values of parameters, which a probe replaces.

    Of what is called as it is, as drop path, no number matters, but whether it is positive.
    """
    order: dict[int, int] = {}

    def number(thing: object) -> int:
        """The same for what occurs twice."""
        return order.setdefault(id(thing), len(order))

    return tuple(
        (
            name,
            type(part),
            number(part),
            tuple((key, child is None) for key, child in part._modules.items()),
            tuple(
                (key, _value(value, _is_called(name, fusion)))
                for key, value in vars(part).items()
                if key not in OF_ANY_MODULE
            ),
            tuple(
                (key, None if value is None else (value.shape, number(value)))
                for key, value in part._parameters.items()
            ),
            tuple((key, id(value)) for key, value in part._buffers.items()),
        )
        for name, part in module.named_modules(remove_duplicate=False)
    )


def _value(value: object, only_sign: bool) -> Any:
    """Something equal for equal numbers, strings, and sequences of them, and for one and the same object."""
    if isinstance(value, list | tuple):
        return tuple(_value(element, only_sign) for element in value)
    if isinstance(value, float) and only_sign:
        return value > 0
    return value if value is None or isinstance(value, int | float | str) else id(value)


def _difference(twin: nn.Module, fusion: Fusion, images: Tensor) -> float:
    """The largest relative difference of results and gradients, in evaluation and in training."""
    largest = 0.0
    for training in (False, True):
        twin.train(training)
        try:
            own, own_state = _results(twin.forward, twin, images)
        except Exception as error:
            raise Unsuitable(f"its forward does not take maps {tuple(images.shape)}: {_brief(error)}") from error
        try:
            ours, our_state = _results(functools.partial(fusion.compute, twin), twin, images)
        except Exception:
            # The parts do not fit together as in what they are taken for.
            return math.inf
        if own_state != our_state:
            raise Unsuitable("it takes random numbers beside those of its drop path")
        largest = max(largest, *map(_relative, own, ours))
    return largest


def _results(
    forward: Callable[[Tensor], Any], twin: nn.Module, images: Tensor
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """What `forward` returns and the gradients of images and parameters; and where random numbers have come to."""
    # All drop the same paths.
    torch.manual_seed(1)
    random.seed(1)
    with backend("reference"):
        y = forward(images)
    state = bytes(torch.get_rng_state().tolist()), random.getstate()
    if not isinstance(y, Tensor):
        raise TypeError(f"it returns {with_article(y)}; expected one tensor")
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    grads = torch.autograd.grad(y, [images, *twin.parameters()], grad, allow_unused=True)
    return [y.detach(), *grads], state


def _brief(error: Exception) -> str:
    return shorten(str(error), 100) or type(error).__name__


def _relative(own: Tensor | None, ours: Tensor | None) -> float:
    if own is None or ours is None:
        return 0.0 if own is ours else float("inf")
    if own.shape != ours.shape:
        return float("inf")
    difference = float((ours - own).norm() / own.norm().clamp_min(1e-30))
    # Of what is not finite nothing is verified.
    return difference if math.isfinite(difference) else math.inf


def with_article(thing: object) -> str:
    """The name of its class, as in 'an InstanceNorm2d'."""
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
