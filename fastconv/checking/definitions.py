"""Our modules in plain PyTorch: the same arguments and parameters, with a forward by `fastconv.reference` alone.

The lecture's classifier has one already: `fastconv.reference.Classifier`.
"""

from __future__ import annotations

from torch import Tensor

from fastconv import modules
from fastconv.operations import reference


class DepthwiseConvLayerNorm(modules.DepthwiseConvLayerNorm):
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


class PointwiseConvGELU(modules.PointwiseConvGELU):
    def forward(self, x: Tensor) -> Tensor:
        return reference.pointwise_conv_gelu(x, self.weight, self.bias, approximate=self.approximate)


class ConvNextBlock(modules.ConvNextBlock):
    def forward(self, inputs: Tensor) -> Tensor:
        return reference.convnext_block(
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
        )
