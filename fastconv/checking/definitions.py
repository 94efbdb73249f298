"""Our modules in plain PyTorch, with the same parameters: `fastconv check` and the benchmarks compare with them.

They share no code with `fastconv.modules`. The lecture's classifier is `fastconv.reference.Classifier`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconv.operations import reference


class DepthwiseConvLayerNorm(nn.Conv2d):
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        multiplier: int,
        kernel_size: int,
        norm: str = "tensor",
        eps: float = 1e-5,
        affine: bool = False,
        device: str | None = None,
    ) -> None:
        wide = in_channels * multiplier
        super().__init__(in_channels, wide, kernel_size, padding="same", groups=in_channels, device=device)
        self.norm, self.eps = norm, eps
        _register_affine(self, wide if affine else None, device)

    def forward(self, x: Tensor) -> Tensor:
        return reference.depthwise_conv_layer_norm(
            x,
            self.weight,
            self.bias,
            norm=self.norm,
            eps=self.eps,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
        )


class PointwiseConvGELU(nn.Conv2d):
    def __init__(
        self, in_channels: int, out_channels: int, approximate: str = "none", device: str | None = None
    ) -> None:
        super().__init__(in_channels, out_channels, 1, device=device)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return reference.pointwise_conv_gelu(x, self.weight, self.bias, approximate=self.approximate)


class ConvNextBlock(nn.Module):
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        multiplier: int,
        kernel_size: int,
        norm: str = "tensor",
        eps: float = 1e-5,
        affine: bool = False,
        device: str | None = None,
    ) -> None:
        super().__init__()
        wide = in_channels * multiplier
        self.conv1 = nn.Conv2d(in_channels, wide, kernel_size, padding="same", groups=in_channels, device=device)
        self.conv2 = nn.Conv2d(wide, in_channels, 1, device=device)
        self.conv3 = nn.Conv2d(in_channels, in_channels, 1, device=device)
        self.norm, self.eps = norm, eps
        _register_affine(self, wide if affine else None, device)

    def forward(self, x: Tensor) -> Tensor:
        y = reference.layer_norm(
            self.conv1(x), norm=self.norm, eps=self.eps, norm_weight=self.norm_weight, norm_bias=self.norm_bias
        )
        return x + self.conv3(F.gelu(self.conv2(y)))


def _register_affine(module: nn.Module, channels: int | None, device: str | None) -> None:
    for name, make in (("norm_weight", torch.ones), ("norm_bias", torch.zeros)):
        values = None if channels is None else nn.Parameter(make(channels, device=device))
        module.register_parameter(name, values)
