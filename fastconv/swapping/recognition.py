"""Which modules of a model the fused operations can compute: recognised by structure, then verified in numbers.

Names and classes differ between libraries, and notebooks hold copies; the parts do not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconv.modules import Classifier, DepthwiseConvLayerNorm, PointwiseConvGELU
from fastconv.modules import ConvNextBlock as FusedBlock
from fastconv.operations import functional
from fastconv.swapping.fusion import DROPOUTS, Chain, ConvNeXtBlock, Fusion, LectureBlock, LectureClassifier, find
from fastconv.swapping.verification import Unsuitable, Verified, own_random_numbers, seen, verify, with_article

LECTURE_CHILDREN = ("stem", "conv_block_1", "downsample", "conv_block_2", "bottleneck")
ALREADY_FUSED = (Classifier, FusedBlock, DepthwiseConvLayerNorm, PointwiseConvGELU)


def recognise(module: nn.Module, recompute: bool, verified: Verified) -> Fusion | None:
    """How to fuse a module; None if it is no candidate.

    Args:
        verified: of the modules that were recognised before; is added to.

    Raises:
        Unsuitable: it is one, but differs from what the fused operations compute.
    """
    if _is_classifier(module):
        return verify(module, [LectureClassifier(recompute)], _images_for(module), verified)
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
            raise Unsuitable(
                f"it has {name}, {with_article(leaf)} with p={leaf.p}; expected none within the block"
            )
    others = [name for name, leaf in leaves.items() if name not in used and _has_state(leaf)]
    if others and (not norms or len(others) > 1 or any(True for _ in leaves[others[0]].buffers())):
        raise _unknown(leaves, others)
    for name, _ in module.named_buffers():
        raise Unsuitable(f"it has the buffer {name}; expected none within the block")
    for name in used:
        _check_own_forward(leaves[name])
    paths = (name for name, child in module.named_children() if not isinstance(child, DROPOUTS))
    drop_path = next((name for name in paths if "drop" in name or "stochastic" in name), None)
    images = torch.empty(2, find(module, depthwise).in_channels, 3, 4)
    if not norms:
        fusions = [
            LectureBlock(recompute, depthwise=depthwise, pointwise=pointwise, projection=projection, norm=norm)
            for norm in functional.NORMS[:2]
        ]
        return verify(module, fusions, images, verified)
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
        return verify(module, [fusion], images, verified)
    # What remains may be a module of the layer scale, or the response norm of ConvNeXt V2.
    (other,) = others
    names = [name for name, _ in leaves[other].named_parameters()]
    scaled = [replace(fusion, scale=f"{other}.{names[0]}")] if len(names) == 1 and not parameters else []
    responses = [replace(fusion, response=other, response_of_maps=of_maps) for of_maps in (False, True)]
    try:
        return verify(module, scaled + responses, images, verified)
    except Unsuitable:
        raise _unknown(leaves, others) from None


def _unknown(leaves: dict[str, nn.Module], names: list[str]) -> Unsuitable:
    found = ", ".join(f"{name}, {with_article(leaves[name])}" for name in names)
    return Unsuitable(f"it has {found}, which the fused block has not")


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _chain(module: nn.Sequential, recompute: bool, verified: Verified) -> Fusion | None:
    if type(module).forward is not nn.Sequential.forward:
        return None
    pairs: list[tuple[str, str, str | None]] = []
    unsuitable: list[Unsuitable] = []
    for (name, first), (next_name, second) in pairwise(module._modules.items()):
        try:
            pair = _pair(first, second, verified)
        except Unsuitable as error:
            unsuitable.append(error)
            continue
        if pair is not None:
            ((_, _, approximate),) = pair.pairs
            pairs.append((name, next_name, approximate))
    if pairs:
        chain = Chain(recompute, pairs=tuple(pairs))
        return replace(chain, seen=seen(module, chain))
    if unsuitable:
        raise unsuitable[0]
    return None


def _pair(first: Any, second: Any, verified: Verified) -> Chain | None:
    """How to fuse an nn.Sequential of the two; None if they are no candidates."""
    approximate: str | None = None
    if not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Module):
        return None
    if _is_depthwise(first) and _is_norm(second) and "2d" in type(second).__name__:
        _check_depthwise(first)
    elif _is_pointwise(first) and (approximate := _gelu(second)) is not None:
        _check_pointwise(first)
    else:
        return None
    _check_own_forward(first)
    fusion = Chain(pairs=(("0", "1", approximate),))
    verify(nn.Sequential(first, second), [fusion], torch.empty(2, first.in_channels, 3, 4), verified)
    return fusion


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
        raise Unsuitable(f"the forward of {with_article(module)} was replaced on the instance")
    for base in (nn.Conv2d, nn.Linear):
        if isinstance(module, base):
            if type(module).forward is not base.forward:
                raise Unsuitable(
                    f"{with_article(module)} has a forward of its own; expected that of nn.{base.__name__}"
                )
            if set(module._parameters) != {"weight", "bias"}:
                names = ", ".join(name for name, _ in module.named_parameters())
                raise Unsuitable(
                    f"{with_article(module)} has the parameters {names}; expected weight and bias alone"
                )
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise Unsuitable(f"its {name} is {with_article(parameter)}; expected a plain nn.Parameter")


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
        with own_random_numbers():
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
