"""A case of `fastconv check` as two functions that should agree, and random tensors to call them with."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastconv import modules
from fastconv.checking import definitions, inputs
from fastconv.checking.cases import MODULES, Case
from fastconv.checking.inputs import Input
from fastconv.operations import backends, functional, reference


class Problem(NamedTuple):
    """Two functions that should agree, and what to call them with: maps, then parameters, some of them None."""

    ours: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    tensors: dict[str, Tensor | None]


def pose(case: Case) -> Problem:
    """Draw the tensors of a case."""
    options: dict[str, Any] = dict(case.options)
    if "norm" in options:
        # ConvNeXt's eps, and the lecture's.
        options["eps"] = 1e-6 if options["norm"] == "channel" else 1e-5
    problem = module_problem if case.subject in MODULES else operation_problem
    return problem(case.subject, case.input, options)


def operation_problem(operation: str, given: Input, options: dict[str, Any]) -> Problem:
    tensors = inputs.draw(operation, given)

    def bind(package: ModuleType) -> Callable[..., Tensor]:
        function = getattr(package, operation)
        return lambda *values: function(**dict(zip(tensors, values, strict=True)), **options)

    return Problem(bind(functional), bind(reference), tensors)


def module_problem(subject: str, given: Input, options: dict[str, Any]) -> Problem:
    module, definition = make_modules(subject, given, options)
    parameters = {name: inputs.draw_parameter(tuple(p.shape)) for name, p in module.named_parameters()}
    images, channels, height, width = given.sizes[:4]
    # The classifier's stem makes maps of the given size, its downsampling smaller ones.
    shape = (images, 3, 4 * height, 4 * width) if subject == "Classifier" else (images, channels, height, width)

    def bind(owner: nn.Module) -> Callable[..., Tensor]:
        return lambda x, *values: functional_call(owner, dict(zip(parameters, values, strict=True)), (x,))

    return Problem(bind(module), bind(definition), {"x": torch.randn(shape), **parameters})


def make_modules(subject: str, given: Input, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our module and its definition, with parameters of the same names."""
    _, channels, _, _, multiplier, (kernel, _) = given.sizes
    if subject == "Classifier":
        width_depth_patch = channels, 1, 4
        return modules.Classifier(*width_depth_patch), reference.Classifier(*width_depth_patch)
    if subject == "PointwiseConvGELU":
        arguments: tuple[int, ...] = channels, channels + 1
    else:
        arguments, options = (channels, multiplier, kernel), {**options, "affine": given.affine}
    module = getattr(modules, subject)(*arguments, **options)
    # It is called with the parameters of the problem: its own need no memory.
    definition = getattr(definitions, subject)(*arguments, **options, device="meta")
    if subject == "DepthwiseConvLayerNorm":
        definition.register_forward_hook(to_autocast_dtype)
    return module, definition


def to_autocast_dtype(_module: nn.Module, _inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """A forward hook: under autocast PyTorch's layer norm may return float32, but our module returns its dtype."""
    return y.to(backends.autocast_dtype(y) or y.dtype)
