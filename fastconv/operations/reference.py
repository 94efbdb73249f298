"""The lecture's classifier and its operations in plain PyTorch: the oracle for every check, and the baseline.

Nothing here is fused, and nothing here imports the rest of fastconv. The functions are the definitions of the
public operations, composed of PyTorch's own; `fastconv.functional` documents their arguments.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_norm(
    x: Tensor,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    process_group: str | None = None,
) -> Tensor:
    # A symbolic trace knows no dtypes.
    if isinstance(x, Tensor):
        for parameter in (norm_weight, norm_bias):
            if parameter is not None and parameter.dtype != x.dtype:
                return _mixed_layer_norm(x, norm, eps, norm_weight, norm_bias, process_group)
    if norm == "channel":
        # Tracers take the shape of a parameter for a constant.
        channels = x.shape[1:2] if norm_weight is None else norm_weight.shape
        y = F.layer_norm(x.permute(0, 2, 3, 1), channels, norm_weight, norm_bias, eps)
        return y.permute(0, 3, 1, 2)
    if norm == "tensor":
        x = F.layer_norm(x, x.shape, eps=eps) if process_group is None else _norm_ranks(x, eps, process_group)
    elif norm == "sample":
        x = F.layer_norm(x, x.shape[1:], eps=eps)
    else:
        raise ValueError(f"norm is {norm!r}; expected one of tensor, sample, channel")
    if norm_weight is not None:
        x = x * norm_weight[:, None, None]
    if norm_bias is not None:
        x = x + norm_bias[:, None, None]
    return x


def _mixed_layer_norm(
    x: Tensor,
    norm: str,
    eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    process_group: str | None,
) -> Tensor:
    """The norm in the widest dtype of maps and parameters, rounded once."""
    dtypes = [each.dtype for each in (x, norm_weight, norm_bias) if each is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    weight, bias = (None if each is None else each.to(dtype) for each in (norm_weight, norm_bias))
    options: dict[str, Any] = {"norm_weight": weight, "norm_bias": bias, "process_group": process_group}
    return layer_norm(x.to(dtype), norm=norm, eps=eps, **options).to(x.dtype)


def _norm_ranks(x: Tensor, eps: float, process_group: str) -> Tensor:
    """The norm of one tensor, of which each rank of a process group has some images, perhaps none."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = wide.new_full((), wide.numel(), dtype=torch.float64)
    total = SumOverRanks.apply(torch.stack([count, wide.sum(dtype=torch.float64)]), process_group)
    centred = wide - (total[1] / total[0]).to(wide.dtype)
    squares = SumOverRanks.apply(centred.square().sum(dtype=torch.float64), process_group)
    return (centred * (squares / total[0] + eps).rsqrt().to(wide.dtype)).to(x.dtype)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks of a process group.

    Its gradient is that of the sum of all ranks' losses: the sum over ranks again. So are further derivatives.
    """

    @staticmethod
    def forward(x: Tensor, process_group: str) -> Tensor:
        return all_reduce(x, process_group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        _, ctx.process_group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return SumOverRanks.apply(grad, ctx.process_group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        total: Tensor = SumOverRanks.apply(tangent, ctx.process_group)
        return total

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], x: Tensor, process_group: str
    ) -> tuple[Tensor, int | None]:
        return SumOverRanks.apply(x, process_group), in_dims[0]


def all_reduce(x: Tensor, process_group: str) -> Tensor:
    """The sum of a tensor over the ranks of a process group, given by its name, outside of autograd.

    By PyTorch's functional collectives, which torch.compile and CUDA graphs can hold.
    """
    collectives = torch.ops._c10d_functional
    total: Tensor = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", process_group))
    return total


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    process_group: str | None = None,
) -> Tensor:
    x = F.conv2d(x, weight, bias, padding="same", groups=x.shape[1])
    return layer_norm(
        x, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias, process_group=process_group
    )


def pointwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    return F.gelu(F.conv2d(x, weight, bias), approximate=approximate)


def convnext_block(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    projection_weight: Tensor,
    projection_bias: Tensor | None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    process_group: str | None = None,
    approximate: str = "none",
) -> Tensor:
    y = depthwise_conv_layer_norm(
        x.to(depthwise_weight.dtype),
        depthwise_weight,
        depthwise_bias,
        norm=norm,
        eps=eps,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        process_group=process_group,
    )
    y = pointwise_conv_gelu(y, pointwise_weight, pointwise_bias, approximate=approximate)
    return F.conv2d(y, projection_weight, projection_bias) + x


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, stride=weight.shape[-2:])


class ConvNextBlock(nn.Module):
    """Depthwise 7x7 convolution (4 outputs per channel), layer norm, pointwise, GELU, pointwise, residual.

    The layer norm has one mean and one variance for the whole tensor, batch included, so an image's output
    depends on the images beside it, in training and in evaluation alike.

    Args:
        in_channels: channels of the input and of the output, C.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4 * in_channels, 7, padding="same", groups=in_channels)
        self.conv2 = nn.Conv2d(4 * in_channels, in_channels, 1)
        self.conv3 = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.conv1(inputs)
        x = F.layer_norm(x, x.shape)
        x = self.conv2(x)
        x = F.gelu(x)
        x = self.conv3(x)
        return x + inputs


class Classifier(nn.Module):
    """The lecture's ConvNeXt-like classifier; the defaults give its 235,434 parameters.

    Args:
        width: channels after the stem; doubled by the downsampling.
        depth: blocks before, and again after, the downsampling.
        patch: side of the stem's patches, in pixels.
        in_channels: channels of an image.
        num_classes: number of logits.

    Shape: (N, in_channels, H, W) -> (N, num_classes), with H and W at least 2 * patch.
    """

    def __init__(
        self, width: int = 32, depth: int = 5, patch: int = 4, in_channels: int = 3, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.conv_block_1 = nn.Sequential(*(ConvNextBlock(width) for _ in range(depth)))
        self.downsample = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.conv_block_2 = nn.Sequential(*(ConvNextBlock(2 * width) for _ in range(depth)))
        self.bottleneck = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.layer_norm(x, x.shape)
        x = self.conv_block_1(x)
        x = F.layer_norm(x, x.shape)
        x = self.downsample(x)
        x = self.conv_block_2(x)
        x = self.bottleneck(x)
        x = F.avg_pool2d(x, x.shape[-2:])
        return x.flatten(1)
