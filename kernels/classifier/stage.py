"""The blocks of a classifier on maps of one size, and the launches that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..block.tiling import MlpTiling
from ..common.launch import Launch
from ..optimizer.tiling import Columns, Matrices
from ..toeplitz.tiling import ToeplitzTiling
from .state import BLOCK

# The eps of all norms: PyTorch's default.
EPS = 1e-5

# A launch, and what it is given.
Call = tuple[Launch, tuple[Tensor | None, ...]]


class BlockMaps(NamedTuple):
    """What a block reads and writes; all but y is for its backward, too."""

    x: Tensor  # (N, C, H, W)
    h: Tensor  # [N, K, P], the depthwise convolution's result
    moments: Tensor  # [1, 3, parts], of h
    z: Tensor  # [N, C, P], what goes into GELU
    y: Tensor  # (N, C, H, W)


class Stage:
    """Blocks that differ only in their parameters and in the maps that they read and write.

    Args:
        x: (N, C, H, W), contiguous maps like a block's.
        block: the parameters of a block by the names of BLOCK, in the dtype of `x`.

    Attributes:
        partials: a block's partial gradients, in the order of BLOCK.
    """

    def __init__(self, x: Tensor, block: Mapping[str, Tensor]) -> None:
        depthwise, pointwise = block["conv1.weight"], block["conv2.weight"]
        self._toeplitz = toeplitz = ToeplitzTiling(x, depthwise, "tensor")
        self._mlp = mlp = MlpTiling(toeplitz, pointwise, "none")
        parts = toeplitz.parts
        self._convolve = toeplitz.forward(x, has_bias=True)
        self._norm_mlp_residual = mlp.forward(x, x, parts, EPS, has_bias=True, has_projection_bias=True)
        h_strides = toeplitz.outputs * toeplitz.pixels, toeplitz.pixels, 1
        self._norm_mlp_residual_backward = mlp.backward(x, parts, EPS)
        backward = toeplitz.backward(h_strides, x, x, x, parts, mlp.sum_parts, EPS)
        self._convolve_backward = backward.launch
        height, width, kernel_height, kernel_width = *x.shape[2:], *depthwise.shape[2:]
        self.partials = (
            Columns(mlp.partials, mlp.length),
            Matrices(backward.partials, toeplitz.outputs, (height, width), (kernel_height, kernel_width)),
        )

    def new_maps(self, x: Tensor, y: Tensor) -> BlockMaps:
        """Uninitialised h, moments and z for x and y; y may be x itself."""
        z = x.new_empty(x.shape[0], x.shape[1], self._toeplitz.pixels)
        return BlockMaps(x, self._toeplitz.new_h(x), self._toeplitz.new_moments(x), z, y)

    def new_sums(self, maps: BlockMaps) -> Tensor:
        """Uninitialised sums for `backward`, [1, 2, parts]."""
        return maps.moments.new_empty(1, 2, self._mlp.sum_parts)

    def forward(self, maps: BlockMaps, block: Mapping[str, Tensor]) -> list[Call]:
        x, h, moments, z, y = maps
        weight, projection, bias, projection_bias, depthwise, depthwise_bias = (block[name] for name in BLOCK)
        parameters = weight, bias, projection, projection_bias
        return [
            (self._convolve, (x, depthwise, depthwise_bias, h, moments)),
            (self._norm_mlp_residual, (h, moments, x, *parameters, z, y)),
        ]

    def backward(
        self,
        grad: Tensor,
        maps: BlockMaps,
        block: Mapping[str, Tensor],
        g: Tensor,
        sums: Tensor,
        columns: Tensor,
        matrices: Tensor,
        biases: Tensor,
    ) -> list[Call]:
        """
        Args:
            grad: (N, C, H, W), the gradient of y, in whose place that of x is written.
            g, sums: like h, and of `new_sums`: for what passes between the two launches.
            columns, matrices, biases: partial gradients, as `partials` describes them.
        """
        x, h, moments, z, _ = maps
        weight, projection, depthwise = block["conv2.weight"], block["conv3.weight"], block["conv1.weight"]
        return [
            (self._norm_mlp_residual_backward, (grad, h, moments, z, weight, projection, g, sums, columns)),
            (self._convolve_backward, (g, h, x, grad, depthwise, moments, sums, grad, matrices, biases)),
        ]
