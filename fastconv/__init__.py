"""Fused convolution modules for PyTorch: depthwise convolution + layer norm, pointwise convolution + GELU."""

from fastconv import functional, reference
from fastconv.graphs import CaptureError, GraphedStep
from fastconv.modules import Classifier, ConvNextBlock, DepthwiseConvLayerNorm, PointwiseConvGELU
from fastconv.operations.backends import BackendUnavailable, backend
from fastconv.swapping import SwapReport, swap, unswap
from fastconv.synchronization import set_process_group

__all__ = [
    "BackendUnavailable",
    "CaptureError",
    "Classifier",
    "ConvNextBlock",
    "DepthwiseConvLayerNorm",
    "GraphedStep",
    "PointwiseConvGELU",
    "SwapReport",
    "backend",
    "functional",
    "reference",
    "set_process_group",
    "swap",
    "unswap",
]
