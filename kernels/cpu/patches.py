"""Convolution of patches that do not overlap, and GELU if wanted, as one operation: `sources/patches.cpp`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import definitions
from ..common.layout import gradient_like
from ..common.registration import DifferentiableOperator, Forward, Operator
from .chunks import address, batch_last, call, new_batch_last, structure

_Arguments = structure(
    "Patches",
    integers="groups inputs outputs height width length patch_height patch_width activation slots",
    pointers="x w bias y z workspace gy gx gw gbias",
)
# What follows the convolution, in the order of the C++ code: nothing, or GELU by its `approximate`.
ACTIVATIONS = ("identity", "none", "tanh")
# Fewer multiplications are not worth another thread.
LEAST_WORK = 2**18


class Inputs(NamedTuple):
    x: Tensor  # (N, I, H, W)
    weight: Tensor  # (O, I, kh, kw), contiguous
    bias: Tensor | None  # (O,)
    activation: str
    # How the result lies, and x, or else a copy of it: with images side by side, or contiguous, as patches of one
    # pixel may.
    batch_last: bool
    keep: bool  # what the backward needs


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, O, H // kh, W // kw); for the backward z, of which y is the activation, and x if it was copied."""
    y, z, copy = _new_results(inputs)
    x = _laid_out(inputs.x, inputs.batch_last)
    if inputs.x.numel() > 0 and not inputs.x.is_meta:
        arguments = _arguments(x, inputs)
        arguments.bias, arguments.y = address(inputs.bias), address(y)
        if z.numel() > 0:
            arguments.z = address(z)
        call("fastconv_patches_forward", arguments)
    return y, z, x if copy.numel() > 0 else copy


def _is_laid_out(x: Tensor, batch_last: bool) -> bool:
    return (x.permute(1, 2, 3, 0) if batch_last else x).is_contiguous()


def _laid_out(x: Tensor, as_batch_last: bool) -> Tensor:
    return batch_last(x).permute(3, 0, 1, 2) if as_batch_last else x.contiguous()


def _new(inputs: Any, channels: int, height: int, width: int) -> Tensor:
    x = inputs.x
    if inputs.batch_last:
        return new_batch_last(x, channels, height, width)
    return x.new_empty(x.shape[0], channels, height, width)


def _new_results(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs.x
    outputs, _, patch_height, patch_width = inputs.weight.shape
    y = _new(inputs, outputs, x.shape[2] // patch_height, x.shape[3] // patch_width)
    z, copy = x.new_empty(0), x.new_empty(0)
    if inputs.keep and inputs.activation != "identity":
        z = x.new_empty(y.shape)
    if inputs.keep and not _is_laid_out(x, inputs.batch_last):
        copy = _new(inputs, *x.shape[1:])
    return y, z, copy


def _arguments(x: Tensor, inputs: Any) -> Any:
    """What both directions take, from maps x that lie as the kernels want them."""
    images, channels, height, width = x.shape
    outputs, _, patch_height, patch_width = inputs.weight.shape
    groups, length = (1, images) if inputs.batch_last else (images, 1)
    if patch_height == patch_width == 1:
        height, width, length = 1, 1, height * width * length
    work = inputs.weight.numel() * groups * (height // patch_height) * (width // patch_width) * length
    return _Arguments(
        groups=groups,
        inputs=channels,
        outputs=outputs,
        height=height,
        width=width,
        length=length,
        patch_height=patch_height,
        patch_width=patch_width,
        activation=ACTIVATIONS.index(inputs.activation),
        slots=max(1, min(torch.get_num_threads(), work // LEAST_WORK)),
        x=address(x),
        w=address(inputs.weight),
    )


class BackwardInputs(NamedTuple):
    grad: Tensor
    needs_x: bool
    needs_parameters: bool
    x: Tensor  # as it lies for the kernels
    weight: Tensor
    z: Tensor
    activation: str
    batch_last: bool


def _backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of weight and bias in one vector, where they are needed."""
    gx, parameters = _new_gradients(inputs)
    x, weight = inputs.x, inputs.weight
    if x.is_meta:
        return gx, parameters
    if x.numel() == 0:
        return gx, parameters.zero_()
    if x.shape[2] % weight.shape[2] or x.shape[3] % weight.shape[3]:
        gx.zero_()
    gy = _laid_out(inputs.grad, inputs.batch_last)
    # A hook for saved tensors may have changed its strides.
    x = _laid_out(x, inputs.batch_last)
    arguments = _arguments(x, inputs)
    arguments.gy, arguments.z = address(gy), address(inputs.z)
    if inputs.needs_x:
        arguments.gx = address(gx)
    if inputs.needs_parameters:
        arguments.gw, arguments.gbias = map(address, parameters.split_with_sizes(_sizes(weight)))
    call("fastconv_patches_backward", arguments)
    return gx, parameters


def _sizes(weight: Tensor) -> list[int]:
    return [weight.numel(), weight.shape[0]]


def _new_gradients(inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
    x = inputs.x
    gx = _new(inputs, *x.shape[1:]) if inputs.needs_x else x.new_empty(0)
    return gx, x.new_empty(sum(_sizes(inputs.weight)) if inputs.needs_parameters else 0)


def _keep(inputs: Inputs, results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    _, z, copy = results
    return copy if copy.numel() > 0 else inputs.x, z


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    needs_x, needs_weight, needs_bias, *_ = forward.needs
    maps, weight, _, activation, batch_last, _ = forward.inputs
    x, z = forward.kept
    needs_parameters = needs_weight or needs_bias
    inputs = BackwardInputs(grad, needs_x, needs_parameters, x, weight, z, activation, batch_last)
    gx, parameters = patch_conv_backward(inputs, forward)
    # That of contiguous maps is contiguous.
    gx = gx.contiguous() if maps.is_contiguous() else gx
    gradients: dict[str, Tensor | None] = {"x": gx if needs_x else None}
    if needs_parameters:
        gw, gbias = torch.split_with_sizes(parameters, _sizes(weight))
        gradients["weight"] = gradient_like(weight, gw)
        gradients["bias"] = gbias if needs_bias else None
    return gradients


patch_conv_backward = Operator(
    "fastconv::native_patch_conv_backward", BackwardInputs, lambda _: _backward, _new_gradients
)
patch_conv = DifferentiableOperator(
    "fastconv::native_patch_conv",
    Inputs,
    lambda _: _forward,
    _new_results,
    definitions.patch_conv,
    _gradients,
    _keep,
)
