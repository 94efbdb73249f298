"""Our modules in plain PyTorch, with the same parameters: `fastconv check` and the benchmarks compare with them.

They share no code with `fastconv.modules`. The lecture's classifier is `fastconv.reference.Classifier`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
        for name, make in (("norm_weight", torch.ones), ("norm_bias", torch.zeros)):
            self.register_parameter(name, nn.Parameter(make(wide, device=device)) if affine else None)

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
    def __init__(
        self, in_channels: int, multiplier: int, kernel_size: int, device: str | None = None, **norm: Any
    ) -> None:
        super().__init__()
        self.conv1 = DepthwiseConvLayerNorm(in_channels, multiplier, kernel_size, device=device, **norm)
        self.conv2 = PointwiseConvGELU(multiplier * in_channels, in_channels, device=device)
        self.conv3 = nn.Conv2d(in_channels, in_channels, 1, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x)))
