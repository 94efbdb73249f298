"""What a part of a module is: by its structure or, for GELU, by what it computes; never by its name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.kernels.common import rules
from fastconv.operations import functional
from fastconv.swapping.randomness import PrivateGenerator

DROPOUTS = nn.modules.dropout._DropoutNd


def leaves(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        if name and not any(True for _ in child.children()):
            yield name, child


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def is_pointwise(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def is_norm(module: nn.Module) -> bool:
    """Whether it may be a layer norm of channels: it has `eps`, and vectors or None as weight and bias."""
    if not hasattr(module, "eps") or any(True for _ in module.buffers()):
        return False
    vectors = [getattr(module, name, False) for name in ("weight", "bias")]
    return all(vector is None or (isinstance(vector, Tensor) and vector.dim() == 1) for vector in vectors)


def has_state(module: nn.Module) -> bool:
    """Whether it has parameters or buffers."""
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def gelu(module: nn.Module) -> str | None:
    """GELU's `approximate` if a module computes it, tried on numbers small and large; else None."""
    if any(True for _ in module.children()) or has_state(module):
        return None
    # Finely where GELU bends, and up to numbers beyond those of float16, at which some activations are clipped.
    bends = torch.linspace(-8, 8, 64, dtype=torch.float64)
    large = torch.logspace(1, 6, 28, dtype=torch.float64)
    x = torch.cat([bends, large, -large]).view(2, 3, 4, 5)
    try:
        with PrivateGenerator():
            # The forward of a copy: the module's own hooks and whatever it keeps notice nothing.
            y = copy.deepcopy(module).eval().forward(x.clone())
    except Exception:
        # A layer for inputs of another shape or type.
        return None
    for approximate in functional.APPROXIMATIONS:
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, rules.gelu(x, approximate)):
            return approximate
    return None


def objections_to_depthwise(conv: Any) -> Iterator[str]:
    """Why our operations cannot take the place of a depthwise convolution."""
    for attribute, expected in (("stride", (1, 1)), ("dilation", (1, 1)), ("padding_mode", "zeros")):
        got = getattr(conv, attribute)
        if got != expected:
            yield f"its depthwise convolution has {attribute} {got}; expected {expected}"
    if any(side % 2 == 0 for side in conv.kernel_size):
        yield f"its depthwise convolution has a kernel of {conv.kernel_size}; expected odd sides"
    same = tuple(side // 2 for side in conv.kernel_size)
    if conv.padding not in ("same", same):
        yield f"its depthwise convolution has padding {conv.padding}; expected {same}"


def objections_to_pointwise(conv: Any) -> Iterator[str]:
    """Why our operations cannot take the place of a pointwise convolution."""
    if conv.stride != (1, 1) or conv.padding not in ("same", "valid", (0, 0)):
        yield (
            f"its pointwise convolution has stride {conv.stride} and padding {conv.padding}; "
            "expected (1, 1) and (0, 0)"
        )


def objections_to_forward(part: nn.Module) -> Iterator[str]:
    """Why a part computes something else than its parameters suggest."""
    if "forward" in vars(part):
        yield f"the forward of {with_article(part)} was replaced on the instance"
    for base in (nn.Conv2d, nn.Linear):
        if isinstance(part, base):
            if type(part).forward is not base.forward:
                yield f"{with_article(part)} has a forward of its own; expected that of nn.{base.__name__}"
            if set(part._parameters) != {"weight", "bias"}:
                names = ", ".join(name for name, _ in part.named_parameters())
                yield f"{with_article(part)} has the parameters {names}; expected weight and bias alone"
    for name, parameter in part.named_parameters():
        if type(parameter) is not nn.Parameter:
            yield f"its {name} is {with_article(parameter)}; expected a plain nn.Parameter"


def with_article(thing: Any) -> str:
    """The name of its class, as in 'an InstanceNorm2d'."""
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
