"""Layer norm as one operation for each direction: `sources/layer_norm.cpp`.

A norm of a whole tensor, or of each image, does not depend on the order of its values: maps are taken as they lie
in memory, and results lie like them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import definitions
from ..common.registration import DifferentiableOperator, Forward, Operator
from . import exchange
from .chunks import SLOT_ELEMENTS, address, call, structure

_Arguments = structure(
    "LayerNorm",
    integers="groups length interleaved slots",
    numbers="eps",
    pointers="x y statistics workspace gy gx shared exchange",
)

# The orders of the dimensions (N, C, H, W) in memory: contiguous, channels_last, and images side by side.
_CONTIGUOUS, _CHANNELS_LAST, _BATCH_LAST = _ORDERS = (0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0)


class Inputs(NamedTuple):
    x: Tensor  # (N, C, H, W)
    norm: str
    eps: float
    group: str | None


class ForwardPlan:
    """Normalised maps; for the backward the statistics (3, groups), and all ranks' moments, if any."""

    def __init__(self, inputs: Inputs) -> None:
        self.order = _order(inputs.x)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        results = y, statistics, moments = _results(inputs, self.order)
        if inputs.x.is_meta:
            return results
        with_ranks = exchange.of_moments(moments, inputs.group)
        if inputs.x.numel() > 0:
            x = _in_order(inputs.x, self.order)
            arguments = _arguments(x, statistics, self.order)
            arguments.eps, arguments.y = inputs.eps, address(y)
            call("fastconv_layer_norm_forward", arguments, with_ranks)
        elif with_ranks is not None:
            with_ranks.run_empty()
        return results


class BackwardInputs(NamedTuple):
    grad: Tensor
    x: Tensor
    statistics: Tensor
    moments: Tensor
    group: str | None


class BackwardPlan:
    """The gradient of x, which lies like x."""

    def __init__(self, inputs: BackwardInputs) -> None:
        self.order = _order(inputs.x)

    def __call__(self, inputs: BackwardInputs) -> Tensor:
        gx = _new_maps(inputs.x, self.order)
        if gx.is_meta:
            return gx
        with_ranks = exchange.of_sums(inputs.moments, inputs.group)
        if gx.numel() > 0:
            x, gy = _in_order(inputs.x, self.order), _in_order(inputs.grad, self.order)
            arguments = _arguments(x, inputs.statistics, self.order)
            arguments.gy, arguments.gx = address(gy), address(gx)
            call("fastconv_layer_norm_backward", arguments, with_ranks)
        elif with_ranks is not None:
            with_ranks.run_empty()
        return gx


def _order(x: Tensor) -> tuple[int, ...]:
    """In which the dimensions of `x` lie; for those that lie in no such order, contiguous."""
    return next((order for order in _ORDERS if x.permute(order).is_contiguous()), _CONTIGUOUS)


def _in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x.contiguous() if order == _CONTIGUOUS else x.permute(order).contiguous()


def _new_maps(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Uninitialised maps like `x`, whose dimensions lie in this order."""
    strides, stride = [0] * 4, 1
    for dim in reversed(order):
        strides[dim], stride = stride, stride * x.shape[dim]
    return x.new_empty_strided(x.shape, strides)


def _arguments(x: Tensor, statistics: Tensor, order: tuple[int, ...]) -> Any:
    """What both directions take, for the values x in their order."""
    groups = statistics.shape[1]
    return _Arguments(
        groups=groups,
        length=x.numel() // groups,
        interleaved=groups > 1 and order == _BATCH_LAST,
        slots=max(1, min(torch.get_num_threads(), x.numel() // SLOT_ELEMENTS)),
        x=address(x),
        statistics=address(statistics),
    )


def _results(inputs: Inputs, order: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs.x
    statistics = x.new_empty(3, x.shape[0] if inputs.norm == "sample" else 1)
    return _new_maps(x, order), statistics, exchange.new_moments(x, inputs.group)


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return _results(inputs, _order(inputs.x))


def _fake_backward(inputs: BackwardInputs) -> Tensor:
    return _new_maps(inputs.x, _order(inputs.x))


def _gradients(forward: Forward, grad: Tensor) -> dict[str, Tensor | None]:
    x, _, _, group = forward.inputs
    statistics, moments = forward.kept
    return {"x": layer_norm_backward(BackwardInputs(grad, x, statistics, moments, group), forward)}


layer_norm_backward = Operator(
    "fastconv::native_layer_norm_backward", BackwardInputs, BackwardPlan, _fake_backward
)
layer_norm = DifferentiableOperator(
    "fastconv::native_layer_norm", Inputs, ForwardPlan, _fake, definitions.layer_norm, _gradients
)
