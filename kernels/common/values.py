"""The parameters of a convolution and of a norm, as the values in which implementations take them.

Imports no Triton, so that every implementation can share them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Convolution(NamedTuple):
    """The parameters of a convolution: weight (outputs, inputs per group, height, width), bias (outputs,)."""

    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """A layer norm of maps (N, C, H, W), as Ba et al., arXiv:1607.06450, define it.

    Args:
        over: what each mean and variance is computed over: "tensor", "sample" or "channel".
        eps: added to the variance.
        weight, bias: (C,), scale and shift the normalised maps; None is 1 and 0.
    """

    over: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None

    def affine(self, x: Tensor) -> Tensor:
        """Normalised maps x (N, C, H, W), scaled and shifted."""
        if self.weight is not None:
            x = x * self.weight[:, None, None]
        return x if self.bias is None else x + self.bias[:, None, None]

    def fold_into(self, pointwise: Convolution) -> Convolution:
        """The pointwise convolution of maps without scale and shift: W (g x + s) + b = (W g) x + (W s + b)."""
        weight, bias = pointwise
        if self.bias is not None:
            shift = weight.flatten(1) @ self.bias
            bias = shift if bias is None else bias + shift
        if self.weight is not None:
            weight = weight * self.weight[:, None, None]
        return Convolution(weight, bias)
