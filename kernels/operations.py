"""The operations on Triton kernels, with the signatures of the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import block_operator, norm_operators, pointwise_operator


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
    # Wider blocks are composed of the other operations.
    if max(x.shape[1], pointwise_weight.shape[0]) > block_operator.WIDEST:
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
        return x + F.conv2d(y, projection_weight, projection_bias)
    # The norm's affine map goes into the pointwise convolution that follows: W (g x^ + s) + b.
    weight, bias = pointwise_weight.flatten(1), pointwise_bias
    if norm_bias is not None:
        shift = weight @ norm_bias
        bias = shift if bias is None else bias + shift
    if norm_weight is not None:
        weight = weight * norm_weight
    return block_operator.convnext_block(
        x,
        depthwise_weight.contiguous(),
        _contiguous(depthwise_bias),
        weight.contiguous(),
        _contiguous(bias),
        projection_weight.flatten(1).contiguous(),
        _contiguous(projection_bias),
        norm,
        eps,
        approximate,
    )[0]


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
    y = norm_operators.depthwise_conv_layer_norm(x, weight.contiguous(), _contiguous(bias), norm, eps)[0]
    return _affine(y, norm_weight, norm_bias)


def pointwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    weight, bias = weight.flatten(1).contiguous(), _contiguous(bias)
    needs_grad = any(value is not None and value.requires_grad for value in (x, weight, bias))
    keep_slope = needs_grad and torch.is_grad_enabled()
    return pointwise_operator.pointwise_conv_gelu(x, weight, bias, approximate, keep_slope)[0]


def layer_norm(
    x: Tensor,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    return _affine(norm_operators.layer_norm(x, norm, eps)[0], norm_weight, norm_bias)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight[:, None, None]
    return x if bias is None else x + bias[:, None, None]


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's: patches that do not overlap are one matrix product, which it leaves to the vendor's library."""
    return F.conv2d(x, weight, bias, stride=weight.shape[2:])
