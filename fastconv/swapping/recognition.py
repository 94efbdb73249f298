"""What a module may be: hypotheses from its structure, which verification then tries.

Names and classes differ between libraries, and notebooks hold copies; the parts do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import nn

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
    block = _Block(module)
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


class _Block:
    """The parts of a block, by their paths."""

    def __init__(self, module: nn.Module) -> None:
        # All submodules without children.
        self.leaves = dict(parts.leaves(module))
        (self.depthwise,) = self._where(parts.is_depthwise)
        self.pointwise, self.projection, *_ = self._where(parts.is_pointwise)
        self.norm = next(iter(self._where(parts.is_norm)), None)
        # The leaves whose parameters the fused block takes.
        self.used = [path for path in (self.depthwise, self.norm, self.pointwise, self.projection) if path]
        self.rest = {path: leaf for path, leaf in self.leaves.items() if path not in self.used}
        self.others = [path for path, leaf in self.rest.items() if parts.has_state(leaf)]
        self.scales = [name for name, _ in module.named_parameters(recurse=False)]
        approximations = (parts.gelu(leaf) for leaf in self.rest.values())
        self.approximate = next((each for each in approximations if each is not None), None)
        # Any child without parameters may drop whole images in training.
        self.drop_paths = [
            name
            for name, child in module.named_children()
            if not isinstance(child, (nn.Identity, parts.DROPOUTS)) and not parts.has_state(child)
        ]

    def _where(self, holds: Callable[[nn.Module], bool]) -> list[str]:
        return [path for path, leaf in self.leaves.items() if holds(leaf)]


def _objections(module: nn.Module, block: _Block) -> Iterator[str]:
    """Why a block cannot be fused, as far as its parts show."""
    if "forward" in vars(module):
        yield "its forward was replaced on the instance"
    if isinstance(module, torch.fx.GraphModule):
        yield "it is a graph of torch.fx; swap the module that was traced, then trace it"
    yield from parts.objections_to_depthwise(block.leaves[block.depthwise])
    for path, leaf in block.leaves.items():
        if isinstance(leaf, parts.DROPOUTS) and leaf.p > 0:
            yield f"it has {path}, {with_article(leaf)} with p={leaf.p}; expected none within the block"
    others = [block.leaves[path] for path in block.others]
    if others and (block.norm is None or len(others) > 1 or any(True for _ in others[0].buffers())):
        yield _unknown(block)
    for name, _ in module.named_buffers():
        yield f"it has the buffer {name}; expected none within the block"
    for path in block.used:
        yield from parts.objections_to_forward(block.leaves[path])
    # The lecture's block calls functions for its norm and GELU, and has no scale.
    if block.norm is not None:
        if len(block.scales) > 1:
            yield f"it has the parameters {', '.join(block.scales)}; expected one layer scale at most"
        if block.approximate is None:
            yield _no_gelu(block)


def _unknown(block: _Block) -> str:
    found = ", ".join(f"{path}, {with_article(block.leaves[path])}" for path in block.others)
    return f"it has {found}, which the fused block has not"


def _no_gelu(block: _Block) -> str:
    others = ", ".join(type(leaf).__name__ for leaf in block.rest.values() if not isinstance(leaf, nn.Identity))
    if others:
        return f"no GELU is among its parts ({others}); other activations are not fused"
    return "no GELU is among its parts; expected it as a module, such as nn.GELU()"


def _of_block(block: _Block) -> Hypotheses:
    """What a block without objections may be."""
    products = block.depthwise, block.pointwise, block.projection
    if block.norm is None or block.approximate is None:
        return Hypotheses([LectureBlock(*products, norm=norm) for norm in ("tensor", "sample")])
    scale = block.scales[0] if block.scales else None
    plain = ConvNeXtBlock(*products, norm=block.norm, scale=scale, approximate=block.approximate)
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


def pairs(module: nn.Sequential) -> Iterator[tuple[tuple[str, str], nn.Sequential, Hypotheses | Refusal]]:
    """Neighbours that may be a depthwise convolution and a norm, or a pointwise convolution and GELU.

    Yields their names, both together, and what these may be.
    """
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
        found = Hypotheses([Chain((("0", "1", approximate),))]) if objection is None else Refusal(objection)
        yield (name, next_name), nn.Sequential(first, second), found
