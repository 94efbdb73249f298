"""The fused operations as nn.Modules, with the lecture's arguments, defaults and state_dict keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastconv.kernels.common.values import check_approximate, check_norm
from fastconv.operations import functional


class DepthwiseConvLayerNorm(nn.Conv2d):
    """`nn.Conv2d(C, C * M, kernel_size, padding="same", groups=C)`, then layer norm, as one operation.

    Its parameters are those of `nn.Conv2d`, with the same initial values, and `norm_weight` and `norm_bias`,
    (C * M,), if `affine`.

    Args:
        in_channels: C.
        multiplier: M, convolution outputs for each input channel.
        kernel_size: an odd number of pixels.
        norm: what each mean and variance is computed over: "tensor", "sample" or "channel".
        eps: added to the variance.
        affine: scale and shift each channel after the norm.
        bias: add a bias to the convolution.

    Shape: (N, C, H, W) -> (N, C * M, H, W).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        multiplier: int = 4,
        kernel_size: int = 7,
        norm: str = "tensor",
        eps: float = 1e-5,
        affine: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_positive(in_channels=in_channels, multiplier=multiplier, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; expected an odd number")
        check_norm(norm, eps)
        super().__init__(
            in_channels,
            in_channels * multiplier,
            kernel_size,
            padding="same",
            groups=in_channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.norm = norm
        self.eps = eps
        if affine:
            self.norm_weight = nn.Parameter(torch.ones(self.out_channels, device=device, dtype=dtype))
            self.norm_bias = nn.Parameter(torch.zeros(self.out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("norm_weight", None)
            self.register_parameter("norm_bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return functional.depthwise_conv_layer_norm(
            x,
            self.weight,
            self.bias,
            norm=self.norm,
            eps=self.eps,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm}, eps={self.eps}, affine={self.norm_weight is not None}"


class PointwiseConvGELU(nn.Conv2d):
    """`nn.Conv2d(I, O, 1)`, then GELU, as one operation, with the parameters of `nn.Conv2d`.

    Args:
        in_channels: I.
        out_channels: O.
        bias: add a bias to the convolution.
        approximate: "none", GELU by the error function; or "tanh".

    Shape: (N, I, H, W) -> (N, O, H, W).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        check_approximate(approximate)
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return functional.pointwise_conv_gelu(x, self.weight, self.bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate}"


class ConvNextBlock(nn.Module):
    """The lecture's block as one operation: depthwise, layer norm, pointwise, GELU, pointwise, residual.

    With the defaults it computes what `fastconv.reference.ConvNextBlock` does, with the same state_dict. The
    submodules hold the parameters, but are not called one by one: hooks on them do not run.

    Args:
        in_channels: channels of the input and of the output, C.
        multiplier, kernel_size, norm, eps, affine: as `DepthwiseConvLayerNorm`'s.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        multiplier: int = 4,
        kernel_size: int = 7,
        norm: str = "tensor",
        eps: float = 1e-5,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = DepthwiseConvLayerNorm(
            in_channels, multiplier, kernel_size, norm, eps, affine, device=device, dtype=dtype
        )
        self.conv2 = PointwiseConvGELU(multiplier * in_channels, in_channels, device=device, dtype=dtype)
        self.conv3 = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.convnext_block(
            inputs,
            self.conv1.weight,
            self.conv1.bias,
            self.conv2.weight,
            self.conv2.bias,
            self.conv3.weight,
            self.conv3.bias,
            norm=self.conv1.norm,
            eps=self.conv1.eps,
            norm_weight=self.conv1.norm_weight,
            norm_bias=self.conv1.norm_bias,
            approximate=self.conv2.approximate,
        )


class Classifier(nn.Module):
    """The lecture's classifier of fused blocks; the defaults give its 235,434 parameters.

    It computes what `fastconv.reference.Classifier` does, with the same state_dict.

    Args:
        width: channels after the stem; doubled by the downsampling.
        depth: blocks before, and again after, the downsampling.
        patch: side of the stem's patches, in pixels.
        in_channels: channels of an image.
        num_classes: number of logits.
        norm: what each layer norm is computed over. The lecture's "tensor" makes an image's logits depend on the
            images beside it, in training and in evaluation alike; with "sample" they do not.

    Shape: (N, in_channels, H, W) -> (N, num_classes), with H and W at least 2 * patch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        width: int = 32,
        depth: int = 5,
        patch: int = 4,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: str = "tensor",
    ) -> None:
        super().__init__()
        _check_positive(width=width, depth=depth, patch=patch, in_channels=in_channels, num_classes=num_classes)
        self.norm = norm
        self.stem = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.conv_block_1 = nn.Sequential(*(ConvNextBlock(width, norm=norm) for _ in range(depth)))
        self.downsample = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.conv_block_2 = nn.Sequential(*(ConvNextBlock(2 * width, norm=norm) for _ in range(depth)))
        self.bottleneck = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return classify(self, x, self.norm)

    def extra_repr(self) -> str:
        return f"norm={self.norm}"


def classify(model: Any, x: Tensor, norm: str) -> Tensor:
    """The forward of `Classifier`, with the parameters and the blocks of `model`."""
    x = functional.patch_conv(x, model.stem.weight, model.stem.bias)
    x = functional.layer_norm(x, norm=norm)
    x = model.conv_block_1(x)
    x = functional.layer_norm(x, norm=norm)
    x = functional.patch_conv(x, model.downsample.weight, model.downsample.bias)
    x = model.conv_block_2(x)
    x = functional.patch_conv(x, model.bottleneck.weight, model.bottleneck.bias)
    return x.mean((2, 3))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; expected one integer")
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
