"""Layer norm over a tensor or its images, as a registered operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.launch import (
    Launch,
    ceil_div,
    flat_pixels,
    next_power_of_2,
    strides,
)
from ..common.registration import DifferentiableOperator, Operator
from ..common.rules import check_differentiated_once
from .kernels import norm_backward, norm_moments, norm_sums, normalise
from .plan import Normed


class Norm(Normed):
    """A layer norm of maps, and how its kernels divide them: a program takes `block` elements of one image."""

    def __init__(self, images: int, channels: int, pixels: int, norm: str) -> None:
        super().__init__(norm, images)
        self.length, self.pixels = channels * pixels, pixels
        self.block = min(2048, next_power_of_2(self.length))
        self.blocks = ceil_div(self.length, self.block)
        self.programs = images * self.blocks
        self.parts = self.programs if norm == "tensor" else self.blocks

    def options(self) -> dict[str, Any]:
        return {"PIXELS": self.pixels, "LENGTH": self.length, "NORM": self.norm, "BLOCK": self.block}

    def moments(self, x: Tensor) -> Launch:
        """Of x and its moments, which it writes."""
        return Launch(norm_moments, self.programs, self.images, self.parts, *strides(x), **self.options())

    def normalise(self, x_strides: tuple[int, int, int], moment_parts: int, eps: float, y: Tensor) -> Launch:
        """Of x, its moments and y, which it writes."""
        return Launch(
            normalise,
            self.programs,
            self.images,
            moment_parts,
            eps,
            *x_strides,
            *strides(y),
            BLOCK_PARTS=self.block_parts,
            **self.options(),
        )

    def sums(self, grad: Tensor, x_strides: tuple[int, int, int], moment_parts: int, eps: float) -> Launch:
        """Of grad, x, its moments, and the sums of grad and of grad * normalised, [groups, 2, parts]."""
        return Launch(
            norm_sums,
            self.programs,
            self.images,
            moment_parts,
            self.parts,
            eps,
            *strides(grad),
            *x_strides,
            BLOCK_PARTS=self.block_parts,
            **self.options(),
        )

    def new_sums(self, moments: Tensor) -> Tensor:
        return moments.new_empty(self.groups, 2, self.parts)

    def backward(
        self, grad: Tensor, x: Tensor, moment_parts: int, sum_parts: int, eps: float, grad_x: Tensor
    ) -> Launch:
        """Of grad, x, its moments, the sums, and the gradient of x, which it writes."""
        return Launch(
            norm_backward,
            self.programs,
            self.images,
            moment_parts,
            sum_parts,
            eps,
            *strides(grad),
            *strides(x),
            *strides(grad_x),
            BLOCK_PARTS=self.block_parts,
            **self.options(),
        )


def norm_of(x: Tensor, norm: str) -> Norm:
    return Norm(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], norm)


class NormForward:
    """y like x, and for the backward the moments of x."""

    def __init__(self, x: Tensor, norm: str, eps: float) -> None:
        x = flat_pixels(x)
        sizes = self.sizes = norm_of(x, norm)
        self.moments = sizes.moments(x)
        self.collapse = sizes.collapse_moments(sizes.parts)
        self.normalise = sizes.normalise(strides(x), self.collapse.parts, eps, torch.empty_like(x))

    def __call__(self, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        x = flat_pixels(x)
        y, moments = torch.empty_like(x), self.sizes.new_moments(x)
        if x.numel() > 0:
            self.moments(x, moments)
            self.normalise(x, self.collapse(moments), y)
        return y, moments


def _fake_norm(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    x = flat_pixels(x)
    return torch.empty_like(x), norm_of(x, norm).new_moments(x)


class NormBackward:
    """The gradient of x, like x."""

    def __init__(self, grad: Tensor, x: Tensor, moments: Tensor, norm: str, eps: float) -> None:
        x, grad = flat_pixels(x), flat_pixels(grad)
        sizes = self.sizes = norm_of(x, norm)
        self.collapse_moments = sizes.collapse_moments(moments.shape[2])
        self.collapse_sums = sizes.collapse_sums(sizes.parts)
        moment_parts, sum_parts = self.collapse_moments.parts, self.collapse_sums.parts
        self.sums = sizes.sums(grad, strides(x), moment_parts, eps)
        self.backward = sizes.backward(grad, x, moment_parts, sum_parts, eps, torch.empty_like(x))

    def __call__(self, grad: Tensor, x: Tensor, moments: Tensor, *_: Any) -> Tensor:
        x, grad = flat_pixels(x), flat_pixels(grad)
        grad_x = torch.empty_like(x)
        if x.numel() > 0:
            moments, sums = self.collapse_moments(moments), self.sizes.new_sums(moments)
            self.sums(grad, x, moments, sums)
            self.backward(grad, x, moments, self.collapse_sums(sums), grad_x)
        return grad_x


def _fake_norm_backward(grad: Tensor, x: Tensor, moments: Tensor, norm: str, eps: float) -> Tensor:
    return torch.empty_like(flat_pixels(x))


def _save_norm(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output[1])
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    check_differentiated_once()
    return layer_norm_backward(grad, *ctx.saved_tensors, *ctx.options, forward=ctx), None, None


layer_norm_backward = Operator("fastconv::layer_norm_backward", NormBackward, _fake_norm_backward)
layer_norm = DifferentiableOperator("fastconv::layer_norm", NormForward, _fake_norm, _save_norm, _norm_gradients)
