"""Layer norm over a tensor or its images, as a registered operator; its backward is `BackwardPlan`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..common import definitions
from ..common.layout import flat_pixels, new_like, strides
from ..common.registration import DifferentiableOperator, Forward, Operator
from .tiling import LayerNormTiling


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    norm: str
    eps: float
    group: str | None


class ForwardPlan:
    """y like x, and for the backward the moments of x, of all ranks if a process group has parts of it."""

    def __init__(self, inputs: Inputs) -> None:
        x = flat_pixels(inputs.x)
        self.tiling = LayerNormTiling(x, inputs.norm, inputs.group)
        self.moments = self.tiling.moments(x)
        self.finish = self.tiling.finish_moments(self.tiling.parts)
        self.normalise = self.tiling.normalise(strides(x), self.finish.parts, inputs.eps, new_like(x))

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        x = flat_pixels(inputs.x)
        y, moments = new_like(x), self.tiling.new_moments(x)
        if x.numel() == 0 and inputs.group is None:
            return y, moments
        if x.numel() > 0:
            self.moments(x, moments)
        merged = self.finish(moments)
        if x.numel() > 0:
            self.normalise(x, merged, y)
        return y, moments if inputs.group is None else merged


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x = flat_pixels(inputs.x)
    return new_like(x), LayerNormTiling(x, inputs.norm, inputs.group).new_kept_moments(x)


class BackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    moments: Tensor
    norm: str
    eps: float
    group: str | None


class BackwardPlan:
    """The gradient of x, like x."""

    def __init__(self, inputs: BackwardInputs) -> None:
        x, grad = flat_pixels(inputs.x), flat_pixels(inputs.grad)
        tiling = self.tiling = LayerNormTiling(x, inputs.norm, inputs.group)
        self.collapse_moments = tiling.collapse_moments(inputs.moments.shape[2])
        self.finish_sums = tiling.finish_sums(tiling.parts, x.numel())
        moment_parts, sum_parts = self.collapse_moments.parts, self.finish_sums.parts
        self.sums = tiling.sums(grad, strides(x), moment_parts, inputs.eps)
        self.backward = tiling.backward(grad, x, moment_parts, sum_parts, inputs.eps, new_like(x))

    def __call__(self, inputs: BackwardInputs) -> Tensor:
        x, grad = flat_pixels(inputs.x), flat_pixels(inputs.grad)
        grad_x = new_like(x)
        if x.numel() == 0 and inputs.group is None:
            return grad_x
        moments, sums = self.collapse_moments(inputs.moments), self.tiling.new_sums(inputs.moments)
        if x.numel() > 0:
            self.sums(grad, x, moments, sums)
        sums = self.finish_sums(sums, moments)
        if x.numel() > 0:
            self.backward(grad, x, moments, sums, grad_x)
        return grad_x


def _fake_backward(inputs: BackwardInputs) -> Tensor:
    return new_like(flat_pixels(inputs.x))


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor]:
    x, *options = forward.inputs
    return {"x": layer_norm_backward(BackwardInputs(grad, x, *forward.kept, *options), forward)}


layer_norm_backward = Operator("fastconv::layer_norm_backward", BackwardInputs, BackwardPlan, _fake_backward)
layer_norm = DifferentiableOperator(
    "fastconv::layer_norm", Inputs, ForwardPlan, _fake, definitions.layer_norm, _gradients
)
