"""Layer norm, and the depthwise convolution with layer norm, as registered operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convolution import Depthwise
from .launch import ceil_div, check_differentiated_once, flat_pixels, launch, new_maps, next_power_of_2, strides
from .moments import Normed
from .norm import norm_backward, norm_moments, norm_sums, normalise


class Norm(Normed):
    """A layer norm of maps, and how its kernels divide them: a program takes `block` elements of one image."""

    def __init__(self, images: int, channels: int, pixels: int, norm: str) -> None:
        super().__init__(norm, images)
        self.length, self.pixels = channels * pixels, pixels
        self.block = min(2048, next_power_of_2(self.length))
        self.blocks = ceil_div(self.length, self.block)
        self.programs = images * self.blocks

    @property
    def parts(self) -> int:
        return self.programs if self.norm == "tensor" else self.blocks

    def options(self) -> dict[str, Any]:
        return {"PIXELS": self.pixels, "LENGTH": self.length, "NORM": self.norm, "BLOCK": self.block}

    def moments(self, x: Tensor, moments: Tensor) -> None:
        sizes = self.images, self.parts
        launch(norm_moments, self.programs, x, moments, *sizes, *strides(x), **self.options())

    def normalise(
        self, x: Tensor, x_strides: tuple[int, int, int], moments: Tensor, eps: float, y: Tensor
    ) -> None:
        launch(
            normalise,
            self.programs,
            x,
            moments,
            y,
            self.images,
            moments.shape[2],
            eps,
            *x_strides,
            *strides(y),
            BLOCK_PARTS=self.block_parts,
            **self.options(),
        )

    def sums(
        self, grad: Tensor, x: Tensor, x_strides: tuple[int, int, int], moments: Tensor, eps: float
    ) -> Tensor:
        """Of grad, and of grad * normalised: [groups, 2, parts]."""
        sums = moments.new_empty(self.groups, 2, self.parts)
        launch(
            norm_sums,
            self.programs,
            grad,
            x,
            moments,
            sums,
            self.images,
            moments.shape[2],
            self.parts,
            eps,
            *strides(grad),
            *x_strides,
            BLOCK_PARTS=self.block_parts,
            **self.options(),
        )
        return self.collapse_sums(sums)

    def backward(self, grad: Tensor, x: Tensor, moments: Tensor, sums: Tensor, eps: float, grad_x: Tensor) -> None:
        launch(
            norm_backward,
            self.programs,
            grad,
            x,
            moments,
            sums,
            grad_x,
            self.images,
            moments.shape[2],
            sums.shape[2],
            eps,
            *strides(grad),
            *strides(x),
            *strides(grad_x),
            BLOCK_PARTS=self.block_parts,
            **self.options(),
        )


@torch.library.custom_op("fastconv::layer_norm", mutates_args=())
def layer_norm(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """y like x, and for the backward the moments of x."""
    x = flat_pixels(x)
    plan = Norm(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], norm)
    y, moments = torch.empty_like(x), plan.new_moments(x)
    if x.numel() > 0:
        plan.moments(x, moments)
        plan.normalise(x, strides(x), plan.collapse_moments(moments), eps, y)
    return y, moments


@layer_norm.register_fake
def _(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    x = flat_pixels(x)
    return torch.empty_like(x), Norm(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], norm).new_moments(x)


@torch.library.custom_op("fastconv::layer_norm_backward", mutates_args=())
def layer_norm_backward(grad: Tensor, x: Tensor, moments: Tensor, norm: str, eps: float) -> Tensor:
    x, grad = flat_pixels(x), flat_pixels(grad)
    grad_x = torch.empty_like(x)
    if x.numel() > 0:
        plan = Norm(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], norm)
        moments = plan.collapse_moments(moments)
        sums = plan.sums(grad, x, strides(x), moments, eps)
        plan.backward(grad, x, moments, sums, eps, grad_x)
    return grad_x


@layer_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, moments: Tensor, norm: str, eps: float) -> Tensor:
    return torch.empty_like(flat_pixels(x))


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output[1])
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    check_differentiated_once()
    return layer_norm_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


layer_norm.register_autograd(_norm_gradients, setup_context=_save_norm)


@torch.library.custom_op("fastconv::depthwise_conv_layer_norm", mutates_args=())
def depthwise_conv_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, K, H, W) in the memory format of x, and for the backward h [N, K, P] and its moments."""
    x = flat_pixels(x)
    y, h, moments = _depthwise_results(x, weight, norm)
    if x.numel() > 0:
        depthwise = Depthwise(x, weight, norm)
        depthwise.forward(x, weight, bias, h, moments)
        plan = Norm(x.shape[0], weight.shape[0], h.shape[2], norm)
        merged = depthwise.collapse_moments(moments)
        plan.normalise(h, (h.stride(0), h.stride(1), 1), merged, eps, y)
    return y, h, moments


def _depthwise_results(x: Tensor, weight: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    depthwise = Depthwise(x, weight, norm)
    return new_maps(x, depthwise.outputs), depthwise.new_h(weight), depthwise.new_moments(weight)


@depthwise_conv_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _depthwise_results(flat_pixels(x), weight, norm)


@torch.library.custom_op("fastconv::depthwise_conv_layer_norm_backward", mutates_args=())
def depthwise_conv_layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, h: Tensor, moments: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of x, like x, and one vector of those of weight and bias."""
    x, grad = flat_pixels(x), flat_pixels(grad)
    size = weight.numel() + weight.shape[0]
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, moments.new_zeros(size)
    parameters = moments.new_empty(size)
    depthwise = Depthwise(x, weight, norm)
    plan = Norm(x.shape[0], weight.shape[0], h.shape[2], norm)
    moments = depthwise.collapse_moments(moments)
    sums = plan.sums(grad, h, (h.stride(0), h.stride(1), 1), moments, eps)
    matrices, biases = depthwise.backward(grad, strides(grad), h, x, None, weight, moments, sums, eps, grad_x)
    depthwise.reduce(moments.new_empty(1, 0), matrices, biases, parameters)
    return grad_x, parameters


@depthwise_conv_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, h: Tensor, moments: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(flat_pixels(x)), moments.new_empty(weight.numel() + weight.shape[0])


def _save_depthwise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.set_materialize_grads(False)


def _depthwise_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    check_differentiated_once()
    weight = ctx.saved_tensors[1]
    grad_x, parameters = depthwise_conv_layer_norm_backward(grad, *ctx.saved_tensors, *ctx.options)
    taps, bias = parameters.to(weight.dtype).split([weight.numel(), weight.shape[0]])
    needed = zip((grad_x, taps.view(weight.shape), bias), ctx.needs_input_grad, strict=False)
    return *(value if wanted else None for value, wanted in needed), None, None


depthwise_conv_layer_norm.register_autograd(_depthwise_gradients, setup_context=_save_depthwise)
