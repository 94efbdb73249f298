"""The operations on C++ kernels for CPUs, each where it takes that form; else on the portable path.

Results are contiguous if the maps are, or else lie as suits the kernels.
"""

from __future__ import annotations

from torch import Tensor

from fastconv.kernels.common.rules import needs_grad
from fastconv.kernels.common.values import Convolution, Norm
from fastconv.kernels.cpu import block, depthwise_layer_norm, patches
from fastconv.kernels.cpu import layer_norm as norms
from fastconv.operations import backends, decisions, portable

# That the kernels compute.
NORMS = ("tensor", "sample")
# The kernels count in 32 bits, and a little beyond the last element.
MOST_ELEMENTS = 2**30


def convnext_block(
    x: Tensor,
    depthwise: Convolution,
    pointwise: Convolution,
    projection: Convolution,
    norm: Norm,
    approximate: str,
) -> Tensor:
    if not (_convolves(x, depthwise, norm) and _counts(x, depthwise, pointwise, projection)):
        return portable.convnext_block(x, depthwise, pointwise, projection, norm, approximate)
    pointwise = norm.contiguous().fold_into(pointwise.contiguous())
    parameters = *depthwise.contiguous(), *pointwise, *projection.contiguous()
    keep = needs_grad(x, *parameters)
    return block.convnext_block(x, *parameters, norm.over, norm.eps, norm.group, approximate, keep)


def depthwise_conv_layer_norm(x: Tensor, depthwise: Convolution, norm: Norm) -> Tensor:
    if not (_convolves(x, depthwise, norm) and _counts(x, depthwise)):
        return portable.depthwise_conv_layer_norm(x, depthwise, norm)
    parameters = depthwise.contiguous()
    y = depthwise_layer_norm.depthwise_conv_layer_norm(x, *parameters, norm.over, norm.eps, norm.group)
    return norm.affine(y)


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    if norm.over not in NORMS or not _counts(x):
        return portable.layer_norm(x, norm)
    return norm.affine(norms.layer_norm(x, norm.over, norm.eps, norm.group))


def pointwise_conv_gelu(x: Tensor, conv: Convolution, approximate: str) -> Tensor:
    if not ((_forced() or decisions.native_pointwise_conv_gelu(x, conv)) and _counts(x, conv)):
        return portable.pointwise_conv_gelu(x, conv, approximate)
    weight, bias = conv.contiguous()
    batch_last = decisions.has_images_side_by_side(x)
    return patches.patch_conv(x, weight, bias, approximate, batch_last, needs_grad(x, weight, bias))


def patch_conv(x: Tensor, conv: Convolution) -> Tensor:
    if not ((_forced() or decisions.native_patch_conv(x, conv)) and _counts(x, conv)):
        return portable.patch_conv(x, conv)
    weight, bias = conv.contiguous()
    return patches.patch_conv(x, weight, bias, "identity", True, needs_grad(x, weight, bias))


def _convolves(x: Tensor, depthwise: Convolution, norm: Norm) -> bool:
    """Whether a kernel computes the convolution and its norm."""
    if norm.over not in NORMS:
        return False
    # The norm of a single value is constant: its gradient is 0, and not almost.
    if depthwise.weight.shape[0] * x.shape[2] * x.shape[3] == 1:
        return False
    return _forced() or decisions.native_convolution(x)


def _counts(x: Tensor, *convolutions: Convolution) -> bool:
    """Whether the kernels can count the elements of the widest maps, and of each weight."""
    images, channels, height, width = x.shape
    widest = max([channels, *(conv.weight.shape[0] for conv in convolutions)])
    elements = [images * widest * height * width, *(conv.weight.numel() for conv in convolutions)]
    return max(elements) <= MOST_ELEMENTS


def _forced() -> bool:
    """Whether the kernels are to run wherever they can, also where others are faster."""
    return backends.current() == "native"
