"""The operations on Triton kernels, with the signatures of the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .block import operator as block_operator
from .channel_norm import operators as channel_norm_operators
from .layer_norm import operator as layer_norm_operator
from .pointwise import operator as pointwise_operator
from .stencil import operators as stencil_operators
from .toeplitz import operator as toeplitz_operator

# On maps of more pixels the convolution is a stencil: a Toeplitz matrix has P^2 entries for each channel.
LARGEST_TOEPLITZ_MAP = 256
# Channels that one program can hold, for the norm of a pixel.
WIDEST_CHANNEL_NORM = 4096
# Inputs times outputs of a pointwise convolution. The products of larger weights take longer than the passes of
# GELU that the kernel saves, and the vendor's library multiplies faster. Worked out from the bytes and operations
# of ConvNeXt's stages on an H100; not measured.
LARGEST_POINTWISE = 192 * 768


def convnext_block(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    projection_weight: Tensor,
    projection_bias: Tensor | None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    approximate: str = "none",
) -> Tensor:
    widest = max(x.shape[1], pointwise_weight.shape[0])
    if norm == "channel" or widest > block_operator.WIDEST or _is_large(x):
        work = pointwise_weight.dtype
        y = depthwise_conv_layer_norm(
            x.to(work),
            depthwise_weight,
            depthwise_bias,
            norm=norm,
            eps=eps,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
        )
        y = pointwise_conv_gelu(y, pointwise_weight, pointwise_bias, approximate=approximate)
        return x + _pointwise_conv(y, projection_weight, projection_bias)
    # The norm's affine map goes into the pointwise convolution that follows: W (g x^ + s) + b.
    # Contiguous first: a matrix product may round otherwise for other strides.
    weight, bias = pointwise_weight.contiguous(), _contiguous(pointwise_bias)
    norm_weight, norm_bias = _contiguous(norm_weight), _contiguous(norm_bias)
    if norm_bias is not None:
        shift = weight.flatten(1) @ norm_bias
        bias = shift if bias is None else bias + shift
    if norm_weight is not None:
        weight = weight * norm_weight[:, None, None]
    return block_operator.convnext_block(
        x,
        depthwise_weight.contiguous(),
        _contiguous(depthwise_bias),
        weight,
        bias,
        projection_weight.contiguous(),
        _contiguous(projection_bias),
        norm,
        eps,
        approximate,
    )


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    weight, bias = weight.contiguous(), _contiguous(bias)
    if norm == "channel" and weight.shape[0] <= WIDEST_CHANNEL_NORM:
        norm_weight, norm_bias = _contiguous(norm_weight), _contiguous(norm_bias)
        parameters = weight, bias, norm_weight, norm_bias
        keep = _needs_grad(x, *parameters)
        return stencil_operators.depthwise_conv_channel_norm(x, *parameters, eps, keep)
    if norm == "channel" or _is_large(x):
        h = stencil_operators.depthwise_conv(x, weight, bias)
        return layer_norm(h, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias)
    y = toeplitz_operator.depthwise_conv_layer_norm(x, weight, bias, norm, eps)
    return _affine(y, norm_weight, norm_bias)


def _is_large(x: Tensor) -> bool:
    return x.shape[2] * x.shape[3] > LARGEST_TOEPLITZ_MAP


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def pointwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    if weight.numel() > LARGEST_POINTWISE:
        return F.gelu(_pointwise_conv(x, weight, bias), approximate=approximate)
    weight, bias = weight.contiguous(), _contiguous(bias)
    return pointwise_operator.pointwise_conv_gelu(x, weight, bias, approximate, _needs_grad(x, weight, bias))


def _pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's, in the memory format of x: of channels_last maps one matrix product."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


def layer_norm(
    x: Tensor,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    if norm == "channel" and x.shape[1] <= WIDEST_CHANNEL_NORM:
        norm_weight, norm_bias = _contiguous(norm_weight), _contiguous(norm_bias)
        return channel_norm_operators.channel_layer_norm(x, norm_weight, norm_bias, eps)
    if norm == "channel":
        y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), norm_weight, norm_bias, eps)
        y = y.permute(0, 3, 1, 2)
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()
    return _affine(layer_norm_operator.layer_norm(x, norm, eps), norm_weight, norm_bias)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight[:, None, None]
    return x if bias is None else x + bias[:, None, None]


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's: patches that do not overlap are one matrix product, which it leaves to the vendor's library."""
    return F.conv2d(x, weight, bias, stride=weight.shape[2:])
