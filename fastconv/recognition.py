"""Which modules of a model the fused operations can compute: recognised by structure, then verified in numbers.

Names and classes differ between libraries, and notebooks hold copies; the parts do not. A module that has the
parts of a ConvNeXt block is accepted only if, in float64 and with random parameters, in evaluation and in
training, its own forward and ours give the same results and gradients.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconv import functional
from fastconv.backends import backend
from fastconv.fusion import DROPOUTS, Chain, ConvNeXtBlock, Fusion, LectureBlock, LectureClassifier, find
from fastconv.modules import Classifier, DepthwiseConvLayerNorm, PointwiseConvGELU
from fastconv.modules import ConvNextBlock as FusedBlock

# Both compute the same in float64, but for the order of sums; what is rounded to float32 between differs by more.
VERIFIED = 1e-8
ROUNDED = 1e-5
LECTURE_CHILDREN = ("stem", "conv_block_1", "downsample", "conv_block_2", "bottleneck")
NO_PAIR = "no pair"
# Attributes that are no module's own: its parts, hooks, and whether it is training.
OF_ANY_MODULE = frozenset(vars(nn.Module()))
ALREADY_FUSED = (Classifier, FusedBlock, DepthwiseConvLayerNorm, PointwiseConvGELU)


class Unsuitable(Exception):
    """A candidate cannot be fused; the message says why."""


# By all that decides what a module computes, how it is fused: of modules that are alike one is tried.
Verified = dict[tuple[Any, ...], Fusion]


def recognise(module: nn.Module, recompute: bool, verified: Verified) -> Fusion | None:
    """How to fuse a module; None if it is no candidate.

    Args:
        verified: of the modules that were recognised before; is added to.

    Raises:
        Unsuitable: it is one, but differs from what the fused operations compute.
    """
    if _is_classifier(module):
        return _verify(module, [LectureClassifier(recompute)], _images_for(module), verified)
    if isinstance(module, nn.Sequential):
        return _chain(module, recompute, verified)
    if not _is_block(module):
        return None
    return _block(module, recompute, verified)


def _is_classifier(module: nn.Module) -> bool:
    return tuple(name for name, _ in module.named_children()) == LECTURE_CHILDREN and all(
        isinstance(getattr(module, name), nn.Conv2d) for name in ("stem", "downsample", "bottleneck")
    )


def _images_for(classifier: nn.Module) -> Tensor:
    stem = find(classifier, "stem")
    height, width = stem.kernel_size
    return torch.empty(2, stem.in_channels, 4 * height, 6 * width)


def _leaves(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        if name and not any(True for _ in child.children()):
            yield name, child


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _is_pointwise(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _is_block(module: nn.Module) -> bool:
    """Whether it is the smallest module with one depthwise convolution and two products, nn.Sequential aside."""

    def has_parts(parent: nn.Module) -> bool:
        leaves = [leaf for _, leaf in _leaves(parent)]
        return sum(map(_is_depthwise, leaves)) == 1 and sum(map(_is_pointwise, leaves)) >= 2

    smaller = (child for name, child in module.named_modules() if name and not isinstance(child, nn.Sequential))
    return has_parts(module) and not any(has_parts(child) for child in smaller)


def _block(module: nn.Module, recompute: bool, verified: Verified) -> Fusion:
    if "forward" in vars(module):
        raise Unsuitable("its forward was replaced on the instance")
    if isinstance(module, torch.fx.GraphModule):
        raise Unsuitable("it is a graph of torch.fx; swap the module that was traced, then trace it")
    leaves = dict(_leaves(module))
    (depthwise,) = (name for name, leaf in leaves.items() if _is_depthwise(leaf))
    _check_depthwise(leaves[depthwise])
    pointwise, *more = [name for name, leaf in leaves.items() if _is_pointwise(leaf)]
    projection = more[0]
    norms = [name for name, leaf in leaves.items() if _is_norm(leaf)]
    used = {depthwise, pointwise, projection, *norms[:1]}
    for name, leaf in leaves.items():
        if isinstance(leaf, DROPOUTS) and leaf.p > 0:
            raise Unsuitable(f"it has {name}, {_a(leaf)} with p={leaf.p}; expected none within the block")
    others = [name for name, leaf in leaves.items() if name not in used and _has_state(leaf)]
    if others and (not norms or len(others) > 1 or any(True for _ in leaves[others[0]].buffers())):
        raise _unknown(others[0], leaves[others[0]])
    for name, _ in module.named_buffers():
        raise Unsuitable(f"it has the buffer {name}; expected none within the block")
    for name in used:
        _check_own_forward(leaves[name])
    drop_path = next((name for name, _ in module.named_children() if "drop" in name or "stochastic" in name), None)
    images = torch.empty(2, find(module, depthwise).in_channels, 3, 4)
    if not norms:
        fusions = [
            LectureBlock(recompute, depthwise=depthwise, pointwise=pointwise, projection=projection, norm=norm)
            for norm in functional.NORMS[:2]
        ]
        return _verify(module, fusions, images, verified)
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    if len(parameters) > 1:
        raise Unsuitable(f"it has the parameters {', '.join(parameters)}; expected one layer scale at most")
    approximate = _activation([leaf for name, leaf in leaves.items() if name not in used])
    fusion = ConvNeXtBlock(
        recompute,
        depthwise=depthwise,
        norm=norms[0],
        pointwise=pointwise,
        projection=projection,
        scale=parameters[0] if parameters else None,
        drop_path=drop_path,
        approximate=approximate,
    )
    if not others:
        return _verify(module, [fusion], images, verified)
    # What remains may be the response norm of ConvNeXt V2.
    responses = [replace(fusion, response=others[0], response_of_maps=of_maps) for of_maps in (False, True)]
    try:
        return _verify(module, responses, images, verified)
    except Unsuitable:
        raise _unknown(others[0], leaves[others[0]]) from None


def _unknown(name: str, leaf: nn.Module) -> Unsuitable:
    return Unsuitable(f"it has {name}, {_a(leaf)}, which the fused block has not")


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _chain(module: nn.Sequential, recompute: bool, verified: Verified) -> Fusion | None:
    if type(module).forward is not nn.Sequential.forward:
        return None
    children = list(module._modules.items())
    pairs: list[tuple[str, str, str | None]] = []
    unsuitable: list[Unsuitable] = []
    for (name, first), (next_name, second) in pairwise(children):
        try:
            approximate = _pair(first, second, verified)
        except Unsuitable as error:
            unsuitable.append(error)
        else:
            if approximate is not NO_PAIR:
                pairs.append((name, next_name, approximate))
    if pairs:
        chain = Chain(recompute, pairs=tuple(pairs))
        return replace(chain, seen=_seen(module, chain))
    if unsuitable:
        raise unsuitable[0]
    return None


def _pair(first: Any, second: Any, verified: Verified) -> str | None:
    """GELU's `approximate`, None for a norm, or NO_PAIR."""
    approximate: str | None = None
    if not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Module):
        return NO_PAIR
    if _is_depthwise(first) and _is_norm(second) and "2d" in type(second).__name__:
        _check_depthwise(first)
    elif _is_pointwise(first) and (approximate := _gelu(second)) is not None:
        _check_pointwise(first)
    else:
        return NO_PAIR
    _check_own_forward(first)
    fusion = Chain(pairs=(("0", "1", approximate),))
    _verify(nn.Sequential(first, second), [fusion], torch.empty(2, first.in_channels, 3, 4), verified)
    return approximate


def _check_depthwise(conv: Any) -> None:
    for attribute, expected in (("stride", (1, 1)), ("dilation", (1, 1)), ("padding_mode", "zeros")):
        got = getattr(conv, attribute)
        if got != expected:
            raise Unsuitable(f"its depthwise convolution has {attribute} {got}; expected {expected}")
    if any(side % 2 == 0 for side in conv.kernel_size):
        raise Unsuitable(f"its depthwise convolution has a kernel of {conv.kernel_size}; expected odd sides")
    same = tuple(side // 2 for side in conv.kernel_size)
    if conv.padding not in ("same", same):
        raise Unsuitable(f"its depthwise convolution has padding {conv.padding}; expected {same}")


def _check_pointwise(conv: nn.Conv2d) -> None:
    if conv.stride != (1, 1) or conv.padding not in ("same", "valid", (0, 0)):
        raise Unsuitable(
            f"its pointwise convolution has stride {conv.stride} and padding {conv.padding}; "
            "expected (1, 1) and (0, 0)"
        )


def _check_own_forward(module: nn.Module) -> None:
    if "forward" in vars(module):
        raise Unsuitable(f"the forward of {_a(module)} was replaced on the instance")
    for base in (nn.Conv2d, nn.Linear):
        if isinstance(module, base):
            if type(module).forward is not base.forward:
                raise Unsuitable(f"{_a(module)} has a forward of its own; expected that of nn.{base.__name__}")
            if set(module._parameters) != {"weight", "bias"}:
                names = ", ".join(name for name, _ in module.named_parameters())
                raise Unsuitable(f"{_a(module)} has the parameters {names}; expected weight and bias alone")
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise Unsuitable(f"its {name} is {_a(parameter)}; expected a plain nn.Parameter")


def _is_norm(module: nn.Module) -> bool:
    """Whether it may be a layer norm of channels: it has `eps`, and vectors or None as weight and bias."""
    if not hasattr(module, "eps") or any(True for _ in module.buffers()):
        return False
    vectors = [getattr(module, name, False) for name in ("weight", "bias")]
    return all(vector is None or (isinstance(vector, Tensor) and vector.dim() == 1) for vector in vectors)


def _gelu(module: nn.Module) -> str | None:
    """GELU's `approximate` if the module computes it, whatever its name."""
    if any(True for _ in module.children()) or _has_state(module):
        return None
    x = torch.linspace(-4, 4, 24, dtype=torch.float64).view(1, 2, 3, 4)
    try:
        with torch.random.fork_rng(devices=[]):
            # A copy, and not called, so that nothing that it keeps and no hook comes to know of it.
            y = copy.deepcopy(module).forward(x.clone())
    except Exception:
        # A layer for inputs of another shape or type.
        return None
    for approximate in functional.APPROXIMATIONS:
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, F.gelu(x, approximate=approximate)):
            return approximate
    return None


def _activation(leaves: list[nn.Module]) -> str:
    """GELU's `approximate`, of the first of `leaves` that computes it."""
    found = (approximate for leaf in leaves if (approximate := _gelu(leaf)) is not None)
    if (approximate := next(found, None)) is not None:
        return approximate
    others = ", ".join(type(leaf).__name__ for leaf in leaves if not isinstance(leaf, nn.Identity))
    raise Unsuitable(
        f"no GELU is among its parts ({others}); other activations are not fused"
        if others
        else "no GELU is among its parts; expected it as a module, such as nn.GELU()"
    )


def _verify(module: nn.Module, fusions: Sequence[Fusion], images: Tensor, verified: Verified) -> Fusion:
    """The first that computes what `module` does, on random images like `images`, with random parameters.

    Raises:
        Unsuitable: none does.
    """
    try:
        key = _signature(module, fusions[0]), *fusions
        if key not in verified:
            twin = _twin(module)
    except Exception as error:
        # A tensor that is no leaf, a lock, or a parameter of integers, for example.
        raise Unsuitable(f"it cannot be copied for a probe: {_brief(error)}") from error
    if key not in verified:
        with _own_random_numbers():
            images = torch.rand_like(images, dtype=torch.float64).requires_grad_()
            differences = [_difference(twin, fusion, images) for fusion in fusions]
        best = min(differences)
        if not best <= VERIFIED:
            raise Unsuitable(
                f"it does not compute what its parts suggest: on a probe its results or gradients differ from a "
                f"{fusions[0].kind}'s by {best:.1e}" + (", as if it rounded to float32" if best < ROUNDED else "")
            )
        fusion = fusions[differences.index(best)]
        verified[key] = replace(fusion, seen=_seen(module, fusion))
    return verified[key]


def _seen(module: nn.Module, fusion: Fusion) -> tuple[tuple[tuple[str, ...], type[nn.Module]], ...]:
    """For `Fusion.seen`, what is not called any more."""
    parts = dict(module.named_modules(remove_duplicate=False))
    names = fusion.fused or [name for name in parts if name and not _is_called(name, fusion)]
    return tuple((tuple(name.split(".")), type(parts[name])) for name in names)


def _is_called(name: str, fusion: Fusion) -> bool:
    return f"{name}.".startswith(tuple(f"{path}." for path in fusion.called))


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64 with random parameters, and without hooks, which `swap` minds when they run."""
    twin = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
    with _own_random_numbers(), torch.no_grad():
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


@contextmanager
def _own_random_numbers() -> Iterator[None]:
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
            raise Unsuitable(f"it cannot be tried on a probe {tuple(images.shape)}: {_brief(error)}") from error
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
    state = torch.get_rng_state().numpy().tobytes(), random.getstate()
    if not isinstance(y, Tensor):
        raise TypeError(f"it returns {_a(y)}; expected one tensor")
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


def _a(thing: object) -> str:
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
