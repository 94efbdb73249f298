"""The public operations, which `fastconv.operations.functional` defines."""

from fastconv.operations.functional import (
    APPROXIMATIONS,
    NORMS,
    convnext_block,
    depthwise_conv_layer_norm,
    layer_norm,
    patch_conv,
    pointwise_conv_gelu,
)

__all__ = [
    "APPROXIMATIONS",
    "NORMS",
    "convnext_block",
    "depthwise_conv_layer_norm",
    "layer_norm",
    "patch_conv",
    "pointwise_conv_gelu",
]
