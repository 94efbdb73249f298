"""The operations on Triton kernels. Registered operators are flat: here values become their arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.operations import reference

from . import decisions
from .block import operator as block_operator
from .channel_norm import operators as channel_norm_operators
from .common.layout import with_own_strides
from .common.rules import gelu, needs_grad
from .common.values import Convolution, Norm, tensors_in
from .layer_norm import operator as layer_norm_operator
from .pointwise import operator as pointwise_operator
from .stencil import operators as stencil_operators
from .toeplitz import operator as toeplitz_operator


def convnext_block(
    x: Tensor,
    depthwise: Convolution,
    pointwise: Convolution,
    projection: Convolution,
    norm: Norm,
    approximate: str,
) -> Tensor:
    if decisions.convnext_block(x, pointwise, norm) == "parts":
        y = depthwise_conv_layer_norm(x.to(pointwise.weight.dtype), depthwise, norm)
        y = pointwise_conv_gelu(y, pointwise, approximate)
        return _pointwise_conv(y, projection) + x
    # Contiguous first: a matrix product may round otherwise for other strides.
    pointwise = norm.contiguous().fold_into(pointwise.contiguous())
    parameters = *depthwise.contiguous(), *pointwise, *projection.contiguous()
    return block_operator.convnext_block(x, *parameters, norm.over, norm.eps, norm.group, approximate)


def depthwise_conv_layer_norm(x: Tensor, depthwise: Convolution, norm: Norm) -> Tensor:
    form = decisions.depthwise_conv_layer_norm(x, depthwise, norm)
    depthwise = depthwise.contiguous()
    if form == "stencil channel norm":
        norm = norm.contiguous()
        parameters = *depthwise, norm.weight, norm.bias
        keep = needs_grad(x, *parameters)
        return stencil_operators.depthwise_conv_channel_norm(x, *parameters, norm.eps, keep)
    if form == "stencil":
        return layer_norm(stencil_operators.depthwise_conv(x, *depthwise), norm)
    y = toeplitz_operator.depthwise_conv_layer_norm(x, *depthwise, norm.over, norm.eps, norm.group)
    return norm.affine(y)


def pointwise_conv_gelu(x: Tensor, conv: Convolution, approximate: str) -> Tensor:
    if decisions.pointwise_conv_gelu(conv) == "pytorch":
        return gelu(_pointwise_conv(x, conv), approximate)
    conv = conv.contiguous()
    return pointwise_operator.pointwise_conv_gelu(x, *conv, approximate, needs_grad(x, *conv))


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    form = decisions.layer_norm(x, norm)
    if form == "channel norm":
        norm = norm.contiguous()
        return channel_norm_operators.channel_layer_norm(x, norm.weight, norm.bias, norm.eps)
    if form == "pytorch":
        return reference.layer_norm(x, norm=norm.over, eps=norm.eps, norm_weight=norm.weight, norm_bias=norm.bias)
    # Where the parameters are wider, what they scale and shift is not rounded before.
    wide = x.to(next(iter(tensors_in(norm)), x).dtype)
    return norm.affine(layer_norm_operator.layer_norm(wide, norm.over, norm.eps, norm.group)).to(x.dtype)


def patch_conv(x: Tensor, conv: Convolution) -> Tensor:
    """PyTorch's: patches that do not overlap are one matrix product, which it leaves to the vendor's library."""
    if conv.weight.shape[2:] == (1, 1):
        return _pointwise_conv(x, conv)
    return F.conv2d(x, conv.weight, conv.bias, stride=conv.weight.shape[2:])


def _pointwise_conv(x: Tensor, conv: Convolution) -> Tensor:
    """PyTorch's, in the memory format of x: on channels_last maps it is one matrix product.

    There cuDNN's gradient of the weight was 9 % off in bfloat16, measured on an H200.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        weight = with_own_strides(conv.weight).flatten(1)
        return F.linear(x.permute(0, 2, 3, 1), weight, conv.bias).permute(0, 3, 1, 2)
    return F.conv2d(x, conv.weight, conv.bias)
