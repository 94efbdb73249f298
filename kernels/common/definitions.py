"""What each operator computes, as PyTorch's own operations compute it from the operator's inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastconv.operations import reference

from .rules import gelu


def convnext_block(inputs: Any) -> Tensor:
    x, *parameters = inputs[:7]
    return reference.convnext_block(x, *parameters, **_norm(inputs), approximate=inputs.approximate)


def _norm(inputs: Any) -> dict[str, Any]:
    return {"norm": inputs.norm, "eps": inputs.eps, "process_group": inputs.group}


def depthwise_conv_layer_norm(inputs: Any) -> Tensor:
    return reference.depthwise_conv_layer_norm(inputs.x, inputs.weight, inputs.bias, **_norm(inputs))


def depthwise_conv(inputs: Any) -> Tensor:
    x, weight, bias = inputs
    return F.conv2d(x, weight, bias, padding="same", groups=x.shape[1])


def depthwise_conv_channel_norm(inputs: Any) -> Tensor:
    x, weight, bias, norm_weight, norm_bias, eps, _ = inputs
    norm = {"norm": "channel", "eps": eps, "norm_weight": norm_weight, "norm_bias": norm_bias}
    return reference.depthwise_conv_layer_norm(x, weight, bias, **norm)


def channel_norm(inputs: Any) -> Tensor:
    x, weight, bias, eps = inputs
    return reference.layer_norm(x, norm="channel", eps=eps, norm_weight=weight, norm_bias=bias)


def layer_norm(inputs: Any) -> Tensor:
    return reference.layer_norm(inputs.x, **_norm(inputs))


def pointwise_conv_gelu(inputs: Any) -> Tensor:
    return reference.pointwise_conv_gelu(inputs.x, inputs.weight, inputs.bias, approximate=inputs.approximate)


def patch_conv(inputs: Any) -> Tensor:
    x, weight, bias, activation, *_ = inputs
    y = reference.patch_conv(x, weight, bias)
    return y if activation == "identity" else gelu(y, activation)
