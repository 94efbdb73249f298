"""What a module may be: hypotheses from its structure, which verification then tries.

Names and classes differ between libraries, and notebooks hold copies; the parts do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import nn

from fastconv.operations import functional
from fastconv.swapping import parts
from fastconv.swapping.fusion import Chain, ConvNeXtBlock, Fusion, LectureBlock, LectureClassifier
from fastconv.swapping.parts import with_article

LECTURE_CHILDREN = ("stem", "conv_block_1", "downsample", "conv_block_2", "bottleneck")


class Refusal(NamedTuple):
    """Why a candidate cannot be fused, as the report says it."""

    reason: str


class Hypotheses(NamedTuple):
    """The fusions that may compute what a module does, the likeliest first.

    Args:
        otherwise: what to report if none does, where that is clearer than how far their numbers are off.
    """

    fusions: list[Fusion]
    otherwise: Refusal | None = None


def hypotheses(module: nn.Module) -> Hypotheses | Refusal | None:
    """What a module may be as a whole; None if it is no candidate. An nn.Sequential may have `pairs`."""
    if _is_classifier(module):
        return Hypotheses([LectureClassifier()])
    if isinstance(module, nn.Sequential) or not _is_block(module):
        return None
    block = _named_parts(module)
    objection = next(_objections(module, block), None)
    return _of_block(block) if objection is None else Refusal(objection)


def _is_classifier(module: nn.Module) -> bool:
    return tuple(name for name, _ in module.named_children()) == LECTURE_CHILDREN and all(
        isinstance(getattr(module, name), nn.Conv2d) for name in ("stem", "downsample", "bottleneck")
    )


def _is_block(module: nn.Module) -> bool:
    """Whether it is the smallest module with one depthwise convolution and two products, nn.Sequential aside."""

    def has_parts(parent: nn.Module) -> bool:
        leaves = [leaf for _, leaf in parts.leaves(parent)]
        return sum(map(parts.is_depthwise, leaves)) == 1 and sum(map(parts.is_pointwise, leaves)) >= 2

    smaller = (child for name, child in module.named_modules() if name and not isinstance(child, nn.Sequential))
    return has_parts(module) and not any(has_parts(child) for child in smaller)


class _Parts(NamedTuple):
    """The parts of a block, by their paths.

    Args:
        leaves: all submodules without children.
        scales: the block's own parameters.
        activation: the first leaf that computes GELU, and GELU's `approximate`.
        others: leaves with parameters or buffers beside the convolutions and the norm.
        drop_paths: children that may drop whole images in training, as any without parameters may.
    """

    leaves: dict[str, nn.Module]
    depthwise: str
    norm: str | None
    pointwise: str
    projection: str
    scales: list[str]
    activation: tuple[str, str] | None
    others: list[str]
    drop_paths: list[str]

    @property
    def used(self) -> list[str]:
        """The leaves whose parameters the fused block takes."""
        paths = self.depthwise, self.norm, self.pointwise, self.projection
        return [path for path in paths if path is not None]


def _named_parts(module: nn.Module) -> _Parts:
    leaves = dict(parts.leaves(module))
    (depthwise,) = (path for path, leaf in leaves.items() if parts.is_depthwise(leaf))
    pointwise, projection, *_ = (path for path, leaf in leaves.items() if parts.is_pointwise(leaf))
    norm = next((path for path, leaf in leaves.items() if parts.is_norm(leaf)), None)
    rest = {path: leaf for path, leaf in leaves.items() if path not in (depthwise, norm, pointwise, projection)}
    gelus = ((path, approximate) for path, leaf in rest.items() if (approximate := parts.gelu(leaf)) is not None)
    activation = next(gelus, None)
    return _Parts(
        leaves,
        depthwise,
        norm,
        pointwise,
        projection,
        scales=[name for name, _ in module.named_parameters(recurse=False)],
        activation=activation,
        others=[path for path, leaf in rest.items() if parts.has_state(leaf)],
        drop_paths=[
            name
            for name, child in module.named_children()
            if not parts.has_state(child)
            and not isinstance(child, (nn.Identity, parts.DROPOUTS))
            and (activation is None or name != activation[0])
        ],
    )


def _objections(module: nn.Module, block: _Parts) -> Iterator[str]:
    """Why a block cannot be fused, as far as its parts show."""
    leaves = block.leaves
    if "forward" in vars(module):
        yield "its forward was replaced on the instance"
    if isinstance(module, torch.fx.GraphModule):
        yield "it is a graph of torch.fx; swap the module that was traced, then trace it"
    yield from parts.objections_to_depthwise(leaves[block.depthwise])
    for path, leaf in leaves.items():
        if isinstance(leaf, parts.DROPOUTS) and leaf.p > 0:
            yield f"it has {path}, {with_article(leaf)} with p={leaf.p}; expected none within the block"
    if block.others and (
        block.norm is None or len(block.others) > 1 or any(True for _ in leaves[block.others[0]].buffers())
    ):
        yield _unknown(block)
    for name, _ in module.named_buffers():
        yield f"it has the buffer {name}; expected none within the block"
    for path in block.used:
        yield from parts.objections_to_forward(leaves[path])
    # The lecture's block calls functions for its norm and GELU, and has no scale.
    if block.norm is not None:
        if len(block.scales) > 1:
            yield f"it has the parameters {', '.join(block.scales)}; expected one layer scale at most"
        if block.activation is None:
            yield _no_gelu(block)


def _unknown(block: _Parts) -> str:
    found = ", ".join(f"{path}, {with_article(block.leaves[path])}" for path in block.others)
    return f"it has {found}, which the fused block has not"


def _no_gelu(block: _Parts) -> str:
    rest = (leaf for path, leaf in block.leaves.items() if path not in block.used)
    others = ", ".join(type(leaf).__name__ for leaf in rest if not isinstance(leaf, nn.Identity))
    if others:
        return f"no GELU is among its parts ({others}); other activations are not fused"
    return "no GELU is among its parts; expected it as a module, such as nn.GELU()"


def _of_block(block: _Parts) -> Hypotheses:
    """What a block without objections may be."""
    products = block.depthwise, block.pointwise, block.projection
    if block.norm is None or block.activation is None:
        return Hypotheses([LectureBlock(*products, norm=norm) for norm in functional.NORMS[:2]])
    scale = block.scales[0] if block.scales else None
    plain = ConvNeXtBlock(*products, norm=block.norm, scale=scale, approximate=block.activation[1])
    variants, otherwise = [plain], None
    if block.others:
        # It may be a module of the layer scale, or the response norm of ConvNeXt V2.
        (other,) = block.others
        names = [name for name, _ in block.leaves[other].named_parameters()]
        variants = [replace(plain, response=other, response_of_maps=of_maps) for of_maps in (False, True)]
        if len(names) == 1 and scale is None:
            variants.insert(0, replace(plain, scale=f"{other}.{names[0]}"))
        otherwise = Refusal(_unknown(block))
    # Drop path mostly comes last.
    drop_paths = [*reversed(block.drop_paths), None]
    return Hypotheses([replace(each, drop_path=path) for path in drop_paths for each in variants], otherwise)


class Pair(NamedTuple):
    """Two neighbours in an nn.Sequential, by their names, and what both together may be."""

    names: tuple[str, str]
    module: nn.Sequential
    hypotheses: Hypotheses | Refusal


def pairs(module: nn.Sequential) -> Iterator[Pair]:
    """The neighbours that may be a depthwise convolution and a norm, or a pointwise convolution and GELU."""
    if type(module).forward is not nn.Sequential.forward:
        return
    for (name, first), (next_name, second) in pairwise(module._modules.items()):
        if not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Module):
            continue
        approximate: str | None = None
        if parts.is_depthwise(first) and parts.is_norm(second):
            objections = parts.objections_to_depthwise(first)
        elif parts.is_pointwise(first) and (approximate := parts.gelu(second)) is not None:
            objections = parts.objections_to_pointwise(first)
        else:
            continue
        objection = next(chain(objections, parts.objections_to_forward(first)), None)
        fusion = Chain((("0", "1", approximate),))
        found = Hypotheses([fusion]) if objection is None else Refusal(objection)
        yield Pair((name, next_name), nn.Sequential(first, second), found)
