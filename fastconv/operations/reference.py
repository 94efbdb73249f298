"""The lecture's classifier and its operations in plain PyTorch: the oracle for every check, and the baseline.

Nothing here is fused, and nothing here imports the rest of fastconv. The functions are the definitions of the
public operations, composed of PyTorch's own; `fastconv.functional` documents their arguments.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_norm(
    x: Tensor,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    # A symbolic trace knows no dtypes.
    if isinstance(x, Tensor):
        for parameter in (norm_weight, norm_bias):
            if parameter is not None and parameter.dtype != x.dtype:
                return _mixed_layer_norm(x, norm, eps, norm_weight, norm_bias)
    if norm == "channel":
        # Tracers take the shape of a parameter for a constant.
        channels = x.shape[1:2] if norm_weight is None else norm_weight.shape
        y = F.layer_norm(x.permute(0, 2, 3, 1), channels, norm_weight, norm_bias, eps)
        return y.permute(0, 3, 1, 2)
    if norm == "tensor":
        x = F.layer_norm(x, x.shape, eps=eps)
    elif norm == "sample":
        x = F.layer_norm(x, x.shape[1:], eps=eps)
    else:
        raise ValueError(f"norm is {norm!r}; expected one of tensor, sample, channel")
    if norm_weight is not None:
        x = x * norm_weight[:, None, None]
    if norm_bias is not None:
        x = x + norm_bias[:, None, None]
    return x


def _mixed_layer_norm(
    x: Tensor, norm: str, eps: float, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> Tensor:
    """The norm in the widest dtype of maps and parameters, rounded once."""
    dtypes = [each.dtype for each in (x, norm_weight, norm_bias) if each is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    weight, bias = (None if each is None else each.to(dtype) for each in (norm_weight, norm_bias))
    return layer_norm(x.to(dtype), norm=norm, eps=eps, norm_weight=weight, norm_bias=bias).to(x.dtype)


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
    x = F.conv2d(x, weight, bias, padding="same", groups=x.shape[1])
    return layer_norm(x, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias)


def pointwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    return F.gelu(F.conv2d(x, weight, bias), approximate=approximate)


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
    y = depthwise_conv_layer_norm(
        x.to(depthwise_weight.dtype),
        depthwise_weight,
        depthwise_bias,
        norm=norm,
        eps=eps,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    y = pointwise_conv_gelu(y, pointwise_weight, pointwise_bias, approximate=approximate)
    return F.conv2d(y, projection_weight, projection_bias) + x


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, stride=weight.shape[-2:])


class ConvNextBlock(nn.Module):
    """Depthwise 7x7 convolution (4 outputs per channel), layer norm, pointwise, GELU, pointwise, residual.

    The layer norm has one mean and one variance for the whole tensor, batch included, so an image's output
    depends on the images beside it, in training and in evaluation alike.

    Args:
        in_channels: channels of the input and of the output, C.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4 * in_channels, 7, padding="same", groups=in_channels)
        self.conv2 = nn.Conv2d(4 * in_channels, in_channels, 1)
        self.conv3 = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.conv1(inputs)
        x = F.layer_norm(x, x.shape)
        x = self.conv2(x)
        x = F.gelu(x)
        x = self.conv3(x)
        return x + inputs


class Classifier(nn.Module):
    """The lecture's ConvNeXt-like classifier; the defaults give its 235,434 parameters.

    Args:
        width: channels after the stem; doubled by the downsampling.
        depth: blocks before, and again after, the downsampling.
        patch: side of the stem's patches, in pixels.
        in_channels: channels of an image.
        num_classes: number of logits.

    Shape: (N, in_channels, H, W) -> (N, num_classes), with H and W at least 2 * patch.
    """

    def __init__(
        self, width: int = 32, depth: int = 5, patch: int = 4, in_channels: int = 3, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.conv_block_1 = nn.Sequential(*(ConvNextBlock(width) for _ in range(depth)))
        self.downsample = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.conv_block_2 = nn.Sequential(*(ConvNextBlock(2 * width) for _ in range(depth)))
        self.bottleneck = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.layer_norm(x, x.shape)
        x = self.conv_block_1(x)
        x = F.layer_norm(x, x.shape)
        x = self.downsample(x)
        x = self.conv_block_2(x)
        x = self.bottleneck(x)
        x = F.avg_pool2d(x, x.shape[-2:])
        return x.flatten(1)
