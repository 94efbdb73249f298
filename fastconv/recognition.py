"""Which modules of a model the fused operations can compute: recognised by structure, then verified in numbers.

Names and classes differ between libraries, and notebooks hold copies; the parts do not. A module that has the
parts of a ConvNeXt block is accepted only if, in float64 and with random parameters, in evaluation and in
training, its own forward and ours give the same results and gradients.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconv import functional
from fastconv.backends import backend
from fastconv.fusion import Chain, ConvNeXtBlock, Fusion, LectureBlock, LectureClassifier, find
from fastconv.modules import Classifier, DepthwiseConvLayerNorm, PointwiseConvGELU
from fastconv.modules import ConvNextBlock as FusedBlock

# Both compute the same in float64, but for the order of sums.
VERIFIED = 1e-8
LECTURE_CHILDREN = ("stem", "conv_block_1", "downsample", "conv_block_2", "bottleneck")
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
    leaves = dict(_leaves(module))
    (depthwise,) = (name for name, leaf in leaves.items() if _is_depthwise(leaf))
    _check_depthwise(leaves[depthwise])
    pointwise, *more = [name for name, leaf in leaves.items() if _is_pointwise(leaf)]
    projection = more[0]
    norms = [name for name, leaf in leaves.items() if _is_norm(leaf)]
    used = {depthwise, pointwise, projection, *norms[:1]}
    for name, leaf in leaves.items():
        if isinstance(leaf, nn.Dropout) and leaf.p > 0:
            raise Unsuitable(f"it has {name}, {_a(leaf)} with p={leaf.p}; expected none within the block")
    others = [name for name, leaf in leaves.items() if name not in used and _has_state(leaf)]
    if others and (not norms or len(others) > 1 or any(True for _ in leaves[others[0]].buffers())):
        raise _unknown(others[0], leaves[others[0]])
    for name in used:
        _check_own_forward(leaves[name])
    drop_path = next((name for name, _ in module.named_children() if "drop" in name or "stochastic" in name), None)
    images = torch.empty(2, find(module, depthwise).in_channels, 3, 4)
    if not norms:
        fusions = [
            LectureBlock(recompute, depthwise, pointwise, projection, norm) for norm in functional.NORMS[:2]
        ]
        return _verify(module, fusions, images, verified)
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    if len(parameters) > 1:
        raise Unsuitable(f"it has the parameters {', '.join(parameters)}; expected one layer scale at most")
    activation, approximate = _activation({name: leaf for name, leaf in leaves.items() if name not in used})
    fusion = ConvNeXtBlock(
        recompute,
        depthwise,
        norms[0],
        pointwise,
        activation,
        projection,
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
    children = list(module.named_children())
    pairs: list[tuple[str, str, str | None]] = []
    for (name, first), (next_name, second) in pairwise(children):
        if not isinstance(first, nn.Conv2d):
            continue
        if _is_depthwise(first) and _is_norm(second) and "2d" in type(second).__name__:
            _check_depthwise(first)
            pairs.append((name, next_name, None))
        elif _is_pointwise(first) and (approximate := _gelu(second)) is not None:
            _check_pointwise(first)
            pairs.append((name, next_name, approximate))
        else:
            continue
        _check_own_forward(first)
        pair = nn.Sequential(first, second)
        fusion = Chain(pairs=(("0", "1", pairs[-1][2]),))
        _verify(pair, [fusion], torch.empty(2, first.in_channels, 3, 4), verified)
    return Chain(recompute, tuple(pairs)) if pairs else None


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
    for base in (nn.Conv2d, nn.Linear):
        if isinstance(module, base) and type(module).forward is not base.forward:
            raise Unsuitable(f"{_a(module)} has a forward of its own; expected that of nn.{base.__name__}")
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
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return None
    x = torch.linspace(-4, 4, 24, dtype=torch.float64).view(1, 2, 3, 4)
    try:
        y = module(x.clone())
    except Exception:
        # A layer for inputs of another shape or type.
        return None
    for approximate in functional.APPROXIMATIONS:
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, F.gelu(x, approximate=approximate)):
            return approximate
    return None


def _activation(leaves: dict[str, nn.Module]) -> tuple[str, str]:
    for name, leaf in leaves.items():
        approximate = _gelu(leaf)
        if approximate is not None:
            return name, approximate
    others = ", ".join(type(leaf).__name__ for leaf in leaves.values() if not isinstance(leaf, nn.Identity))
    raise Unsuitable(f"no GELU is among its parts ({others}); other activations are not fused")


def _verify(module: nn.Module, fusions: Sequence[Fusion], images: Tensor, verified: Verified) -> Fusion:
    """The first that computes what `module` does, on random images like `images`, with random parameters.

    Raises:
        Unsuitable: none does.
    """
    key = _signature(module, fusions[0]), *fusions
    if key not in verified:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.uniform_(-1, 1)
            images = torch.rand_like(images, dtype=torch.float64).requires_grad_()
            differences = [_difference(twin, fusion, images) for fusion in fusions]
        best = min(differences)
        if not best <= VERIFIED:
            raise Unsuitable(
                f"it does not compute what its parts suggest: on a probe its results or gradients differ from a "
                f"{fusions[0].kind}'s by {best:.1e}"
            )
        verified[key] = fusions[differences.index(best)]
    return verified[key]


def _signature(module: nn.Module, fusion: Fusion) -> tuple[Any, ...]:
    """All that decides what a module computes, but for what fused or not it calls, and the parameters' values."""
    called = tuple(f"{path}." for path in fusion.called)
    return tuple(
        (
            name,
            type(part),
            tuple((key, _value(value)) for key, value in vars(part).items() if key not in OF_ANY_MODULE),
            tuple((key, None if value is None else value.shape) for key, value in part._parameters.items()),
            tuple((key, id(value)) for key, value in part._buffers.items()),
        )
        for name, part in module.named_modules()
        if not f"{name}.".startswith(called)
    )


def _value(value: object) -> Any:
    """Something equal for equal numbers, strings, and sequences of them, and for one and the same object."""
    if isinstance(value, list | tuple):
        return tuple(map(_value, value))
    return value if value is None or isinstance(value, int | float | str) else id(value)


def _difference(twin: nn.Module, fusion: Fusion, images: Tensor) -> float:
    """The largest relative difference of results and gradients, in evaluation and in training."""
    largest = 0.0
    for training in (False, True):
        twin.train(training)
        try:
            own = _results(twin.forward, twin, images)
        except Exception as error:
            raise Unsuitable(f"its forward cannot be tried on a probe {tuple(images.shape)}: {error}") from error
        try:
            ours = _results(functools.partial(fusion.compute, twin), twin, images)
        except Exception:
            # The parts do not fit together as in what they are taken for.
            return math.inf
        largest = max(largest, *map(_relative, own, ours))
    return largest


def _results(forward: Callable[[Tensor], Any], twin: nn.Module, images: Tensor) -> list[Tensor | None]:
    """What `forward` returns, and the gradients of the images and of each parameter of `twin`."""
    # All drop the same paths.
    torch.manual_seed(1)
    with backend("reference"):
        y = forward(images)
    if not isinstance(y, Tensor):
        raise TypeError(f"it returns {_a(y)}; expected one tensor")
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, [images, *twin.parameters()], grad, allow_unused=True)]


def _relative(own: Tensor | None, ours: Tensor | None) -> float:
    if own is None or ours is None:
        return 0.0 if own is ours else float("inf")
    if own.shape != ours.shape:
        return float("inf")
    return float((ours - own).norm() / own.norm().clamp_min(1e-30))


def _a(thing: object) -> str:
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
