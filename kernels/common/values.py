"""The parameters of the operations, as the values in which implementations take them.

Imports no Triton, so that every implementation can share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .layout import with_own_strides

# The norms, and the dimensions of maps (N, C, H, W) over which each takes its mean and variance.
SPANS = {"tensor": (0, 1, 2, 3), "sample": (1, 2, 3), "channel": (1,)}
NORMS = tuple(SPANS)
APPROXIMATIONS = ("none", "tanh")


class Convolution(NamedTuple):
    """The parameters of a convolution: weight (outputs, inputs per group, height, width), bias (outputs,)."""

    weight: Tensor
    bias: Tensor | None

    def contiguous(self) -> Convolution:
        weight, bias = self
        # Eager calls are bound by the host, for which another value takes longer than these questions.
        if weight.is_contiguous() and (bias is None or bias.is_contiguous()):
            return self
        return Convolution(with_own_strides(weight).contiguous(), None if bias is None else bias.contiguous())


class Norm(NamedTuple):
    """A layer norm of maps (N, C, H, W), as Ba et al., arXiv:1607.06450, define it.

    Args:
        over: what each mean and variance is computed over: "tensor", "sample" or "channel".
        eps: added to the variance.
        weight, bias: (C,), scale and shift the normalised maps; None is 1 and 0.
        group: the name of the process group whose ranks each have a part of the maps that "tensor" spans; None if
            all are here, and with the other norms, which span no two images.
    """

    over: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    group: str | None = None

    def contiguous(self) -> Norm:
        _, _, weight, bias, _ = self
        if weight is None and bias is None:
            return self
        weight = None if weight is None else weight.contiguous()
        return self._replace(weight=weight, bias=None if bias is None else bias.contiguous())

    def affine(self, x: Tensor) -> Tensor:
        """Normalised maps x (N, C, H, W), scaled and shifted, in their dtype."""
        dtype = x.dtype
        if self.weight is not None:
            x = x * self.weight[:, None, None]
        if self.bias is not None:
            x = x + self.bias[:, None, None]
        return x.to(dtype)

    def fold_into(self, pointwise: Convolution) -> Convolution:
        """The pointwise convolution of maps without scale and shift: W (g x + s) + b = (W g) x + (W s + b)."""
        if self.weight is None and self.bias is None:
            return pointwise
        weight, bias = pointwise
        dtype = weight.dtype
        if self.bias is not None:
            # Under autocast the norm's parameters are wider.
            shift = weight.flatten(1).to(self.bias.dtype) @ self.bias
            bias = (shift if bias is None else bias + shift).to(dtype)
        if self.weight is not None:
            weight = (weight * self.weight[:, None, None]).to(dtype)
        return Convolution(weight, bias)


# What an operation takes beside maps; the string is GELU's `approximate`.
Value = Convolution | Norm | str


def map_tensors(function: Callable[[Tensor], Tensor], *values: Value) -> tuple[Any, ...]:
    """The values, with `function` applied to each of their tensors, in order."""

    def mapped(value: Any) -> Any:
        if isinstance(value, str):
            return value
        return type(value)(*[function(field) if isinstance(field, Tensor) else field for field in value])

    return tuple(map(mapped, values))


def tensors_in(*values: Value) -> list[Tensor]:
    """The tensors of the values, in the order in which `map_tensors` meets them."""
    return [field for value in values for field in value if isinstance(field, Tensor)]


def span(norm: str) -> tuple[int, ...]:
    """The dimensions of maps (N, C, H, W) that a norm spans.

    Raises:
        ValueError: there is no such norm.
    """
    if norm not in SPANS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
    return SPANS[norm]


def spans_images(norm: str) -> bool:
    """Whether a norm takes its mean and variance over several images."""
    return 0 in span(norm)


def check_norm(norm: str, eps: float) -> None:
    """Raise ValueError unless `norm` is one of NORMS and `eps` at least 0."""
    span(norm)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected at least 0")


def check_approximate(approximate: str) -> None:
    """Raise ValueError unless `approximate` is one of APPROXIMATIONS."""
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate is {approximate!r}; expected one of {', '.join(APPROXIMATIONS)}")
