"""What `fastconv check` tries: the operations and modules, in each precision, on the inputs of `inputs.py`.

It is not every combination. Each operation meets each norm and each dtype, and in float32, where the bound is
tightest, every input; modules, which are thin, meet each norm, and autocast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastconv.checking.inputs import INPUTS, Input
from fastconv.checking.precisions import PRECISIONS
from fastconv.kernels.decisions import LARGEST_TOEPLITZ_MAP
from fastconv.operations import functional

HALF_INPUTS = ("8x8", "4x4 sliced", "11x7")
MODULE_INPUTS = ("8x8 channels_last", "4x4 sliced")
TF32_INPUTS = ("8x8",)

Options = Mapping[str, str]
BY_NORM: tuple[Options, ...] = tuple({"norm": norm} for norm in functional.NORMS)
BY_APPROXIMATION: tuple[Options, ...] = tuple({"approximate": name} for name in functional.APPROXIMATIONS)
# The options with which each is tried.
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
    """One thing to try: an operation or a module, with its options, in a precision, on an input.

    Args:
        subject: a key of OPERATIONS or MODULES.
        options: arguments by name.
        precision: a key of `precisions.PRECISIONS`.
        given: a key of `inputs.INPUTS`.
    """

    subject: str
    options: Options
    precision: str
    given: str

    @property
    def input(self) -> Input:
        return INPUTS[self.given]

    @property
    def is_stencil(self) -> bool:
        """Whether Triton's kernels of it go from tap to tap, instead of multiplying by Toeplitz matrices."""
        convolves = "norm" in self.options and self.subject != "layer_norm"
        sizes = self.input.sizes
        large = sizes.height * sizes.width > LARGEST_TOEPLITZ_MAP
        return convolves and (self.options["norm"] == "channel" or large)

    def __str__(self) -> str:
        return ", ".join([self.subject, *self.options.values(), self.precision, self.given])


def all_cases() -> list[Case]:
    return [
        Case(subject, options, precision, given)
        for subject, choices in (OPERATIONS | MODULES).items()
        for options in choices
        for precision in PRECISIONS
        for given in inputs_for(subject, precision)
    ]


def inputs_for(subject: str, precision: str) -> Sequence[str]:
    """The names of the inputs on which a subject is tried in a precision."""
    if precision == "tf32":
        return () if subject == "layer_norm" else TF32_INPUTS
    if subject in MODULES:
        return MODULE_INPUTS if precision in ("float32", "autocast") else ()
    if precision == "float32":
        normed = "norm" in OPERATIONS[subject][0]
        return [name for name, given in INPUTS.items() if normed or (given.mean, given.scale) == (0, 1)]
    return () if precision == "autocast" else HALF_INPUTS
