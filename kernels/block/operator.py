"""The whole ConvNextBlock as one operator for each direction: two launches forward, three backward.

The backward is `BackwardPlan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import definitions
from ..common.layout import block_gradient_sizes, flat_pixels, gradient_like, in_dtype, new_like
from ..common.registration import DifferentiableOperator, Forward, Operator
from ..common.rules import accumulator
from ..toeplitz.tiling import ToeplitzTiling
from .tiling import MlpTiling


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    depthwise_weight: Tensor  # (K, 1, kh, kw)
    depthwise_bias: Tensor | None  # (K,)
    weight: Tensor  # (O, K, 1, 1)
    bias: Tensor | None  # (O,)
    projection: Tensor  # (C, O, 1, 1)
    projection_bias: Tensor | None  # (C,)
    norm: str
    eps: float
    group: str | None
    approximate: str


class ForwardPlan:
    """y like x, and for the backward: h [N, K, P], its moments, z [N, O, P].

    The moments are those of all ranks if a process group has parts of h.
    """

    def __init__(self, inputs: Inputs) -> None:
        x = flat_pixels(inputs.x)
        self.tiling = ToeplitzTiling(x, inputs.depthwise_weight, inputs.norm, inputs.group)
        self.convolve = self.tiling.forward(x, inputs.depthwise_bias is not None)
        self.finish = self.tiling.finish_moments(self.tiling.parts)
        self.norm_mlp_residual = MlpTiling(self.tiling, inputs.weight, inputs.approximate).forward(
            x,
            new_like(x),
            self.finish.parts,
            inputs.eps,
            inputs.bias is not None,
            inputs.projection_bias is not None,
        )

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = flat_pixels(inputs.x)
        y, h, z = _results(x, inputs.weight, self.tiling)
        moments = self.tiling.new_moments(inputs.weight)
        if x.numel() == 0 and inputs.group is None:
            return y, h, moments, z
        _, depthwise_weight, depthwise_bias, weight, bias, projection, projection_bias, *_ = inputs
        if x.numel() > 0:
            self.convolve(x, depthwise_weight, depthwise_bias, h, moments)
        merged = self.finish(moments)
        if x.numel() > 0:
            self.norm_mlp_residual(h, merged, x, weight, bias, projection, projection_bias, z, y)
        return y, h, moments if inputs.group is None else merged, z


def _results(x: Tensor, weight: Tensor, tiling: ToeplitzTiling) -> tuple[Tensor, Tensor, Tensor]:
    z = weight.new_empty(tiling.images, weight.shape[0], tiling.pixels)
    return new_like(x), tiling.new_h(weight), z


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = flat_pixels(inputs.x)
    tiling = ToeplitzTiling(x, inputs.depthwise_weight, inputs.norm, inputs.group)
    y, h, z = _results(x, inputs.weight, tiling)
    return y, h, tiling.new_kept_moments(inputs.weight), z


class BackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    depthwise_weight: Tensor
    weight: Tensor
    projection: Tensor
    h: Tensor
    moments: Tensor
    z: Tensor
    norm: str
    eps: float
    group: str | None
    approximate: str


class BackwardPlan:
    """The gradient of x, like x, and a vector of the parameters', in the order of `block_gradient_sizes`."""

    def __init__(self, inputs: BackwardInputs) -> None:
        x, grad = flat_pixels(inputs.x), flat_pixels(inputs.grad)
        tiling = self.tiling = ToeplitzTiling(x, inputs.depthwise_weight, inputs.norm, inputs.group)
        mlp = MlpTiling(tiling, inputs.weight, inputs.approximate)
        sizes = block_gradient_sizes(inputs)
        self.length, self.sum_parts, self.partials = sum(sizes), mlp.sum_parts, (mlp.partials, mlp.length)
        self.collapse_moments = tiling.collapse_moments(inputs.moments.shape[2])
        self.finish_sums = tiling.finish_sums(self.sum_parts, inputs.h.numel())
        self.norm_mlp_residual = mlp.backward(grad, self.collapse_moments.parts, inputs.eps)
        self.convolve = tiling.backward(
            (inputs.h.stride(0), inputs.h.stride(1), 1),
            x,
            grad,
            new_like(x),
            self.collapse_moments.parts,
            self.finish_sums.parts,
            inputs.eps,
        )
        self.reduce = tiling.reduce(*self.partials, self.convolve.partials)

    def __call__(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        grad, x, depthwise_weight, weight, projection, h, moments, z, *_ = inputs
        x, grad = flat_pixels(x), flat_pixels(grad)
        grad_x, sums = new_like(x), moments.new_empty(self.tiling.groups, 2, self.sum_parts)
        if x.numel() == 0:
            if inputs.group is not None:
                self.finish_sums(sums, moments)
            return grad_x, moments.new_zeros(self.length)
        parameters = moments.new_empty(self.length)
        g = torch.empty_like(h)
        partials = moments.new_empty(*self.partials)
        moments = self.collapse_moments(moments)
        self.norm_mlp_residual(grad, h, moments, z, weight, projection, g, sums, partials)
        sums = self.finish_sums(sums, moments)
        matrices, biases = self.convolve(g, h, x, grad, depthwise_weight, moments, sums, grad_x)
        self.reduce(partials, matrices, biases, parameters)
        return grad_x, parameters


def _fake_backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
    parameters = inputs.x.new_empty(sum(block_gradient_sizes(inputs)), dtype=accumulator(inputs.weight))
    return new_like(flat_pixels(inputs.x)), parameters


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    x, depthwise_weight, _, weight, _, projection, _, *options = forward.inputs
    inputs = BackwardInputs(grad, x, depthwise_weight, weight, projection, *forward.kept, *options)
    grad_x, parameters = convnext_block_backward(inputs, forward)
    grad_weight, grad_projection, bias, projection_bias, taps, depthwise_bias = torch.split_with_sizes(
        in_dtype(parameters, weight.dtype), block_gradient_sizes(inputs)
    )
    _, _, needs_depthwise_bias, _, needs_bias, _, needs_projection_bias, *_ = forward.needs
    return {
        "x": grad_x,
        "depthwise_weight": gradient_like(depthwise_weight, taps),
        "depthwise_bias": depthwise_bias if needs_depthwise_bias else None,
        "weight": gradient_like(weight, grad_weight),
        "bias": bias if needs_bias else None,
        "projection": gradient_like(projection, grad_projection),
        "projection_bias": projection_bias if needs_projection_bias else None,
    }


convnext_block_backward = Operator(
    "fastconv::convnext_block_backward", BackwardInputs, BackwardPlan, _fake_backward
)
convnext_block = DifferentiableOperator(
    "fastconv::convnext_block", Inputs, ForwardPlan, _fake, definitions.convnext_block, _gradients
)
