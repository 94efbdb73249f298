"""The lecture's classifier and its operations in plain PyTorch, which `fastconv.operations.reference` defines."""

from fastconv.operations.reference import (
    Classifier,
    ConvNextBlock,
    convnext_block,
    depthwise_conv_layer_norm,
    layer_norm,
    patch_conv,
    pointwise_conv_gelu,
)

__all__ = [
    "Classifier",
    "ConvNextBlock",
    "convnext_block",
    "depthwise_conv_layer_norm",
    "layer_norm",
    "patch_conv",
    "pointwise_conv_gelu",
]
