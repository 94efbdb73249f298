"""Random arguments of the operations: a case follows from a seed and an index alone."""

from __future__ import annotations

import functools
import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from fastconv.accuracy import in_format
from fastconv.checking import inputs
from fastconv.checking.inputs import Sizes
from fastconv.kernels.common.values import APPROXIMATIONS, NORMS
from fastconv.operations import definition

# Elements of the maps, so that a case takes milliseconds.
MOST_ELEMENTS = 50_000
HALVES = (torch.float16, torch.bfloat16)


class Values(NamedTuple):
    """How a tensor's elements are drawn.

    Args:
        kind: "normal"; "constant", all `mean`; "sparse", mostly zeros; or "outlier", one of them 1000 `scale`.
        scale: the standard deviation.
        mean: what is added.
    """

    kind: str = "normal"
    scale: float = 1.0
    mean: float = 0.0

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape)
        if self.kind == "constant":
            x = torch.zeros(shape)
        elif self.kind == "sparse":
            x *= torch.rand(shape) < 0.1
        elif self.kind == "outlier" and x.numel() > 0:
            x.flatten()[torch.randint(x.numel(), ())] = 1000.0
        return x * self.scale + self.mean


class Case(NamedTuple):
    """One call of an operation, and what is asked of its gradient.

    Args:
        dtype: of all tensors; with `autocast`, of those that autocast leaves alone.
        layout, grad_layout: of the maps and of the gradient of the result, from LAYOUTS.
        values: how each tensor is drawn, by its name; "grad" is the gradient of the result.
        asked: the tensors whose gradient is asked for; if there is none, the call runs without gradients.
        options: the operation's arguments that are no tensors.
    """

    operation: str
    sizes: Sizes
    shapes: dict[str, tuple[int, ...] | None]
    dtype: torch.dtype
    autocast: torch.dtype | None
    layout: str
    grad_layout: str
    values: dict[str, Values]
    asked: tuple[str, ...]
    options: dict[str, str | float]

    @property
    def computed_in(self) -> torch.dtype:
        return self.autocast or self.dtype


# Each gives maps the strides of its name; the last two also other values, which repeat.
LAYOUTS = {
    **{name: functools.partial(in_format, name=name) for name in ("contiguous", "channels_last", "batch_last")},
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": functools.partial(in_format, name="sliced"),
    "every second image": lambda x: x.repeat_interleave(2, 0)[::2],
    "half of the channels": lambda x: torch.cat([x, x], 1).chunk(2, 1)[1],
    "half of the channels_last": lambda x: (
        torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[0]
    ),
    "expanded": lambda x: x[:1].expand_as(x),
    "overlapping": lambda x: x.contiguous().as_strided(x.shape, (1, 1, x.shape[3], 1)),
}


def draw_case(seed: int, index: int, interpreted: bool = False) -> Case:
    """The case of that index; for Triton's interpreter, which is slow, a small one."""
    chance = random.Random(f"seed {seed} index {index}")
    operation = chance.choice(tuple(definition.PARAMETERS))
    sizes = _draw_sizes(chance, interpreted)
    affine, bias = chance.random() < 0.5, chance.random() < 0.7
    shapes = inputs.shapes(operation, sizes, affine, bias)
    for name in ("norm_weight", "norm_bias"):
        if affine and name in shapes and chance.random() < 0.2:
            shapes[name] = None
    if operation == "patch_conv":
        patch = chance.randint(1, min(4, sizes.height)), chance.randint(1, min(4, sizes.width))
        shapes["weight"] = (*shapes["weight"][:2], *patch)
    dtypes = [torch.float32, *HALVES]
    dtype, autocast = chance.choice(dtypes), None
    if chance.random() < 0.25:
        dtype, autocast = torch.float32, chance.choice(HALVES)
    names = [name for name, shape in shapes.items() if shape is not None]
    parameters = definition.PARAMETERS[operation]
    options: dict[str, str | float] = {}
    if "norm" in parameters:
        options = {"norm": chance.choice(NORMS), "eps": chance.choice((1e-5, 1e-6, 1e-3))}
    if "approximate" in parameters:
        options["approximate"] = chance.choice(APPROXIMATIONS)
    asked = names if chance.random() < 0.6 else [name for name in names if chance.random() < 0.4]
    return Case(
        operation,
        sizes,
        shapes,
        dtype,
        autocast,
        chance.choice(tuple(LAYOUTS)),
        # PyTorch's own convolutions refuse gradients that overlap otherwise than by being expanded.
        chance.choice([layout for layout in LAYOUTS if layout != "overlapping"]),
        {name: _draw_values(chance, name) for name in [*names, "grad"]},
        tuple(asked),
        options,
    )


def _draw_sizes(chance: random.Random, interpreted: bool) -> Sizes:
    if interpreted:
        images, channels, sides, kernel_sides = (0, 1, 2, 3), (1, 2, 3), (1, 2, 3, 5, 7), (1, 3, 5, 7)
    else:
        images, channels = (0, 1, 1, 2, 3, 5, 8, 16, 33, 64), (1, 2, 3, 4, 5, 8, 16, 31)
        sides, kernel_sides = (1, 1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 17), (1, 3, 5, 7, 7, 7, 9)
    multiplier, kernel = chance.randint(1, 4), (chance.choice(kernel_sides), chance.choice(kernel_sides))
    count, depth, height, width = map(chance.choice, (images, channels, sides, sides))
    while count * depth * height * width > MOST_ELEMENTS:
        count //= 2
    return Sizes(count, depth, height, width, multiplier, kernel)


def _draw_values(chance: random.Random, name: str) -> Values:
    if chance.random() < 0.6:
        return Values()
    kind = chance.choice(("normal", "normal", "normal", "constant", "sparse", "outlier"))
    # Mostly what networks meet, at times what they should not.
    exponent = chance.uniform(-3, 3) if chance.random() < 0.8 else chance.uniform(-20, 20)
    scale = 10**exponent
    mean = 0.0
    if chance.random() < 0.4 or kind == "constant":
        mean = chance.choice((-1, 1)) * scale * 10 ** chance.uniform(-1, 4)
    return Values(kind, scale, mean)


def draw_tensors(case: Case) -> dict[str, Tensor | None]:
    """The tensors of a case by their names, in its dtype; the maps in its layout."""
    tensors: dict[str, Tensor | None] = {}
    for name, shape in case.shapes.items():
        if shape is None:
            tensors[name] = None
            continue
        x = case.values[name].draw(shape)
        if name.endswith("weight") and name != "norm_weight":
            # Weights keep the variance of what they are multiplied with.
            x /= math.sqrt(math.prod(shape[1:]))
        tensors[name] = x.to(case.dtype)
    tensors["x"] = LAYOUTS[case.layout](tensors["x"])
    return tensors
