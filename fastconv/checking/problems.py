"""What `fastconv check` tries: the operations and modules, and inputs on each side of their case distinctions.

It is not every combination. Each operation meets each norm and each dtype, and in float32, where the bound is
tightest, every input; modules, which are thin, meet each norm, and autocast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastconv import modules
from fastconv.checking.precisions import PRECISIONS
from fastconv.kernels.decisions import LARGEST_TOEPLITZ_MAP
from fastconv.operations import functional, reference


class Given(NamedTuple):
    """Sizes and values of the maps, and of the parameters that go with them.

    The values that a norm is given have mean `mean` and, but for it, are multiplied by `scale`.
    """

    images: int
    channels: int
    height: int
    width: int
    multiplier: int
    kernel: tuple[int, int]
    layout: str = "contiguous"
    affine: bool = False
    bias: bool = True
    mean: float = 0.0
    scale: float = 1.0


SQUARE = (7, 7)
INPUTS = {
    "8x8": Given(16, 4, 8, 8, 4, SQUARE),
    "8x8 channels_last": Given(16, 4, 8, 8, 4, SQUARE, layout="channels_last", affine=True),
    "4x4 sliced": Given(16, 5, 4, 4, 4, SQUARE, layout="sliced", affine=True),
    "11x7": Given(3, 5, 11, 7, 2, (5, 5), affine=True),
    "11x7 sliced, no bias": Given(3, 5, 11, 7, 2, (5, 5), layout="sliced", bias=False),
    "2x3 under a 9x5 kernel": Given(7, 5, 2, 3, 3, (9, 5), layout="batch_last"),
    "one 7x7 image": Given(1, 4, 7, 7, 4, SQUARE, affine=True),
    # Not small either: see fastconv.operations.decisions.
    "17x19": Given(8, 13, 17, 19, 3, SQUARE, affine=True),
    # E[x^2] - E[x]^2 has no digit left.
    "mean 1000 x std": Given(16, 4, 8, 8, 4, SQUARE, mean=1000.0),
    # eps is not negligible beside the variance.
    "std 0.01": Given(16, 4, 8, 8, 4, SQUARE, scale=0.01),
}
HALF_INPUTS = ("8x8", "4x4 sliced", "11x7")
MODULE_INPUTS = ("8x8 channels_last", "4x4 sliced")
TF32_INPUTS = ("8x8",)

Options = Mapping[str, str]
BY_NORM: tuple[Options, ...] = tuple({"norm": norm} for norm in functional.NORMS)
BY_APPROXIMATION: tuple[Options, ...] = tuple({"approximate": name} for name in functional.APPROXIMATIONS)
OPERATIONS: dict[str, tuple[Options, ...]] = {
    "layer_norm": BY_NORM,
    "depthwise_conv_layer_norm": BY_NORM,
    "pointwise_conv_gelu": BY_APPROXIMATION,
    "convnext_block": (*BY_NORM, {"norm": "tensor", "approximate": "tanh"}),
    "patch_conv": ({},),
}
MODULES: dict[str, tuple[Options, ...]] = {
    "DepthwiseConvLayerNorm": BY_NORM,
    "PointwiseConvGELU": BY_APPROXIMATION,
    "ConvNextBlock": BY_NORM,
    "Classifier": ({"norm": "tensor"},),
}


class Case(NamedTuple):
    """One thing to try: an operation or a module, with its options, in a precision, on an input."""

    subject: str
    options: Options
    precision: str
    given: str

    @property
    def norm(self) -> str:
        return self.options.get("norm", "tensor")

    @property
    def is_stencil(self) -> bool:
        """Whether Triton's kernels of it go from tap to tap, instead of multiplying by Toeplitz matrices."""
        given = INPUTS[self.given]
        convolves = self.subject not in ("layer_norm", "pointwise_conv_gelu", "PointwiseConvGELU", "patch_conv")
        return convolves and (self.norm == "channel" or given.height * given.width > LARGEST_TOEPLITZ_MAP)

    def __str__(self) -> str:
        return ", ".join([self.subject, *self.options.values(), self.precision, self.given])


def cases() -> list[Case]:
    return [
        Case(subject, options, precision, given)
        for subject, choices in (OPERATIONS | MODULES).items()
        for options in choices
        for precision in PRECISIONS
        for given in inputs_for(subject, precision)
    ]


def inputs_for(subject: str, precision: str) -> Sequence[str]:
    if precision == "tf32":
        return () if subject == "layer_norm" else TF32_INPUTS
    if subject in MODULES:
        return MODULE_INPUTS if precision in ("float32", "autocast") else ()
    if precision == "float32":
        normed = "norm" in OPERATIONS[subject][0]
        return [name for name, given in INPUTS.items() if normed or (given.mean, given.scale) == (0, 1)]
    return () if precision == "autocast" else HALF_INPUTS


class Problem(NamedTuple):
    """Two functions that should agree, and what to call them with: maps, then parameters, some of them None."""

    ours: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    tensors: dict[str, Tensor | None]


def pose(case: Case) -> Problem:
    """Draw the tensors of a case."""
    options: dict[str, Any] = dict(case.options)
    if "norm" in options:
        # The lecture's, and ConvNeXt's.
        options["eps"] = 1e-6 if case.norm == "channel" else 1e-5
    problem = module_problem if case.subject in MODULES else operation_problem
    return problem(case.subject, INPUTS[case.given], options)


def operation_problem(operation: str, given: Given, options: dict[str, Any]) -> Problem:
    tensors = operation_tensors(operation, given)

    def bind(package: ModuleType) -> Callable[..., Tensor]:
        function = getattr(package, operation)
        return lambda *values: function(**dict(zip(tensors, values, strict=True)), **options)

    return Problem(bind(functional), bind(reference), tensors)


def operation_tensors(operation: str, given: Given) -> dict[str, Tensor | None]:
    """By the names of the operation's arguments."""
    channels, wide = given.channels, given.channels * given.multiplier

    def bias(size: int, mean: float = 0.0) -> Tensor | None:
        return torch.randn(size) * given.scale + mean if given.bias else None

    def norm(size: int) -> dict[str, Tensor | None]:
        return {name: torch.randn(size) if given.affine else None for name in ("norm_weight", "norm_bias")}

    x = torch.randn(given.images, channels, given.height, given.width) * given.scale
    if operation == "layer_norm":
        return {"x": x + given.mean, **norm(channels)}
    if operation == "pointwise_conv_gelu":
        return {"x": x, "weight": draw_weight(wide + 1, channels, 1, 1), "bias": bias(wide + 1)}
    if operation == "patch_conv":
        return {"x": x, "weight": draw_weight(wide, channels, 2, 2), "bias": bias(wide)}
    taps, shift = draw_weight(wide, 1, *given.kernel), bias(wide, given.mean)
    if operation == "depthwise_conv_layer_norm":
        return {"x": x, "weight": taps, "bias": shift, **norm(wide)}
    return {
        "x": x,
        "depthwise_weight": taps,
        "depthwise_bias": shift,
        "pointwise_weight": draw_weight(channels, wide, 1, 1),
        "pointwise_bias": bias(channels),
        "projection_weight": draw_weight(channels, channels, 1, 1),
        "projection_bias": bias(channels),
        **norm(wide),
    }


def draw_weight(*size: int) -> Tensor:
    """One that keeps the variance of what it is multiplied with."""
    return torch.randn(size) / math.sqrt(math.prod(size[1:]))


def module_problem(subject: str, given: Given, options: dict[str, Any]) -> Problem:
    channels, sizes = given.channels, (given.channels, given.multiplier, given.kernel[0])
    shape = given.images, channels, given.height, given.width
    module: nn.Module
    # Of the maps and the module's parameters by their names.
    definition: Callable[..., Tensor]
    if subject == "DepthwiseConvLayerNorm":
        module = modules.DepthwiseConvLayerNorm(*sizes, affine=given.affine, **options)
        definition = functools.partial(depthwise_definition, options)
    elif subject == "PointwiseConvGELU":
        module = modules.PointwiseConvGELU(channels, channels + 1, **options)
        definition = functools.partial(reference.pointwise_conv_gelu, **options)
    elif subject == "ConvNextBlock":
        module = modules.ConvNextBlock(*sizes, affine=given.affine, **options)
        definition = functools.partial(block_definition, options)
    else:
        # Its stem makes maps of the size that is given, its downsampling smaller ones.
        module = modules.Classifier(channels, depth=1, patch=4)
        shape = given.images, 3, 4 * given.height, 4 * given.width
        lecture = reference.Classifier(channels, depth=1, patch=4)

        def definition(x: Tensor, **parameters: Tensor) -> Tensor:
            return functional_call(lecture, parameters, (x,))

    parameters = {
        name: torch.randn_like(p) if p.dim() == 1 else draw_weight(*p.shape)
        for name, p in module.named_parameters()
    }

    def by_name(values: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(parameters, values, strict=True))

    return Problem(
        lambda x, *values: functional_call(module, by_name(values), (x,)),
        lambda x, *values: definition(x, **by_name(values)),
        {"x": torch.randn(shape), **parameters},
    )


def depthwise_definition(options: dict[str, Any], x: Tensor, **parameters: Any) -> Tensor:
    y = reference.depthwise_conv_layer_norm(x, **parameters, **options)
    # Under autocast PyTorch's layer norm may be float32; the module's result has the autocast dtype.
    device = x.device.type
    return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


def block_definition(options: dict[str, Any], x: Tensor, **parameters: Tensor) -> Tensor:
    """The block in terms of the names that a ConvNextBlock gives its parameters."""
    return reference.convnext_block(
        x,
        parameters["conv1.weight"],
        parameters["conv1.bias"],
        parameters["conv2.weight"],
        parameters["conv2.bias"],
        parameters["conv3.weight"],
        parameters["conv3.bias"],
        norm_weight=parameters.get("conv1.norm_weight"),
        norm_bias=parameters.get("conv1.norm_bias"),
        **options,
    )
