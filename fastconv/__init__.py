"""Fused convolution modules for PyTorch: depthwise convolution + layer norm, pointwise convolution + GELU."""

from fastconv import functional
from fastconv.backends import BackendUnavailable, backend
from fastconv.modules import Classifier, ConvNextBlock, DepthwiseConvLayerNorm, PointwiseConvGELU
from fastconv.swapping import SwapReport, swap, unswap

__all__ = [
    "BackendUnavailable",
    "Classifier",
    "ConvNextBlock",
    "DepthwiseConvLayerNorm",
    "PointwiseConvGELU",
    "SwapReport",
    "backend",
    "functional",
    "swap",
    "unswap",
]
