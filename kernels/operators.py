"""The operations on Triton kernels, each direction one operator registered with PyTorch.

Registered operators are opaque to torch.compile and torch.export, which see the shapes of their results and the
operator that computes their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .block import pointwise_backward, pointwise_forward
from .depthwise import depthwise_backward, depthwise_forward
from .reduction import reduce_partials


def block_size(length: int, largest: int) -> int:
    """A power of two, at most `largest`, and at least 16, the least that tensor cores take."""
    return min(max(16, triton.next_power_of_2(length)), largest)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of image, channel and pixel of `flat_pixels(x)`."""
    return x.stride(0), x.stride(1), x.stride(2) if x.shape[3] == 1 else x.stride(3)


def flat_pixels(x: Tensor) -> Tensor:
    """`x` itself if one stride leads from each pixel to the next, else a copy of which that is true."""
    height, width = x.shape[2:]
    if height == 1 or width == 1 or x.stride(2) == width * x.stride(3):
        return x
    return x.contiguous()


def precision(x: Tensor) -> str:
    """How float32 matrices are multiplied: as `torch.set_float32_matmul_precision` says."""
    if x.device.type == "cpu" or torch.version.hip:
        highest = "ieee"
    else:
        highest = "tf32x3"
    return {"highest": highest, "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Tiles:
    """How the kernels of a block divide their work, and the sizes of what they leave for one another."""

    def __init__(self, x: Tensor, weight: Tensor, norm: str) -> None:
        self.images, self.channels, self.height, self.width = x.shape
        self.outputs = weight.shape[0]
        self.kernel = weight.shape[2], weight.shape[3]
        self.pixels = self.height * self.width
        self.block_pixels = block_size(self.pixels, 64)
        self.pixel_blocks = triton.cdiv(self.pixels, self.block_pixels)
        self.norm = norm
        self.groups = 1 if norm == "tensor" else self.images
        # The depthwise kernels take one channel of many images, the pointwise ones all channels of few.
        self.depthwise_images = block_size(self.images, 64)
        self.depthwise_blocks = triton.cdiv(self.images, self.depthwise_images)
        self.pointwise_images = max(1, 64 // self.block_pixels)
        self.pointwise_programs = triton.cdiv(self.images, self.pointwise_images) * self.pixel_blocks
        parts = self.outputs * self.pixel_blocks
        self.parts = parts * self.depthwise_blocks if norm == "tensor" else parts
        self.sum_parts = self.pointwise_programs if norm == "tensor" else self.pixel_blocks


@torch.library.custom_op("fastconv::convnext_block", mutates_args=())
def convnext_block_forward(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor,
    projection_bias: Tensor | None,
    norm: str,
    eps: float,
    approximate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x, and for the backward: h [N, K, P], moments [groups, 3, parts], z [N, O, P]."""
    x = flat_pixels(x)
    y, h, moments, z = block_outputs(x, depthwise_weight, weight, norm)
    if x.numel() == 0:
        return y, h, moments, z
    tiles = Tiles(x, depthwise_weight, norm)
    images, hidden = tiles.images, weight.shape[0]
    with torch.cuda.device_of(x):
        depthwise_forward[(tiles.outputs * tiles.pixel_blocks * tiles.depthwise_blocks,)](
            x,
            depthwise_weight,
            depthwise_bias,
            h,
            moments,
            images,
            tiles.outputs,
            tiles.parts,
            *strides(x),
            MULTIPLIER=tiles.outputs // tiles.channels,
            HEIGHT=tiles.height,
            WIDTH=tiles.width,
            KERNEL_HEIGHT=tiles.kernel[0],
            KERNEL_WIDTH=tiles.kernel[1],
            HAS_BIAS=depthwise_bias is not None,
            NORM=norm,
            PRECISION=precision(x),
            BLOCK_IMAGES=tiles.depthwise_images,
            BLOCK_PIXELS=tiles.block_pixels,
        )
        pointwise_forward[(tiles.pointwise_programs,)](
            h,
            moments,
            x,
            weight,
            bias,
            projection,
            projection_bias,
            z,
            y,
            images,
            tiles.parts,
            eps,
            *strides(x),
            *strides(y),
            PIXELS=tiles.pixels,
            INPUTS=tiles.outputs,
            HIDDEN=hidden,
            CHANNELS=tiles.channels,
            HAS_BIAS=bias is not None,
            HAS_PROJECTION_BIAS=projection_bias is not None,
            NORM=norm,
            APPROXIMATE=approximate,
            PRECISION=precision(x),
            PARTS=triton.next_power_of_2(tiles.parts),
            BLOCK_IMAGES=tiles.pointwise_images,
            BLOCK_PIXELS=tiles.block_pixels,
            BLOCK_INPUTS=block_size(tiles.outputs, 64),
            BLOCK_HIDDEN=block_size(hidden, 256),
            BLOCK_CHANNELS=block_size(tiles.channels, 256),
        )
    return y, h, moments, z


def block_outputs(
    x: Tensor, depthwise_weight: Tensor, weight: Tensor, norm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = Tiles(x, depthwise_weight, norm)
    h = weight.new_empty(tiles.images, tiles.outputs, tiles.pixels)
    z = weight.new_empty(tiles.images, weight.shape[0], tiles.pixels)
    moments = weight.new_empty(tiles.groups, 3, tiles.parts, dtype=accumulator(weight))
    return torch.empty_like(x), h, moments, z


@convnext_block_forward.register_fake
def _(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor,
    projection_bias: Tensor | None,
    norm: str,
    eps: float,
    approximate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return block_outputs(flat_pixels(x), depthwise_weight, weight, norm)


@torch.library.custom_op("fastconv::convnext_block_backward", mutates_args=())
def convnext_block_backward(
    grad: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    weight: Tensor,
    projection: Tensor,
    h: Tensor,
    moments: Tensor,
    z: Tensor,
    norm: str,
    eps: float,
    approximate: str,
) -> tuple[Tensor, Tensor]:
    """grad_x like x, and the gradients of all parameters, one after another as `parameter_sizes` lists them."""
    x, grad = flat_pixels(x), flat_pixels(grad)
    tiles = Tiles(x, depthwise_weight, norm)
    hidden, dtype = weight.shape[0], accumulator(weight)
    grad_x = torch.empty_like(x)
    sizes = parameter_sizes(depthwise_weight, weight, projection)
    if x.numel() == 0:
        return grad_x, x.new_zeros(sum(sizes), dtype=dtype)
    parameters = x.new_empty(sum(sizes), dtype=dtype)
    g = torch.empty_like(h)
    sums = moments.new_empty(tiles.groups, 2, tiles.sum_parts)
    columns = sum(sizes[:4])
    partials = parameters.new_empty(tiles.pointwise_programs, columns)
    matrices = parameters.new_empty(tiles.depthwise_blocks, tiles.outputs, tiles.pixels, tiles.pixels)
    biases = parameters.new_empty(tiles.depthwise_blocks, tiles.outputs)
    with torch.cuda.device_of(x):
        pointwise_backward[(tiles.pointwise_programs,)](
            grad,
            h,
            moments,
            z,
            weight,
            projection,
            g,
            sums,
            partials,
            tiles.images,
            tiles.parts,
            tiles.sum_parts,
            eps,
            *strides(grad),
            PIXELS=tiles.pixels,
            INPUTS=tiles.outputs,
            HIDDEN=hidden,
            CHANNELS=tiles.channels,
            NORM=norm,
            APPROXIMATE=approximate,
            PRECISION=precision(x),
            PARTS=triton.next_power_of_2(tiles.parts),
            BLOCK_IMAGES=tiles.pointwise_images,
            BLOCK_PIXELS=tiles.block_pixels,
            BLOCK_INPUTS=block_size(tiles.outputs, 32),
            BLOCK_HIDDEN=block_size(hidden, 256),
            BLOCK_CHANNELS=block_size(tiles.channels, 256),
        )
        depthwise_backward[(tiles.channels * tiles.pixel_blocks * tiles.depthwise_blocks,)](
            g,
            h,
            x,
            grad,
            depthwise_weight,
            moments,
            sums,
            grad_x,
            matrices,
            biases,
            tiles.images,
            tiles.channels,
            tiles.parts,
            tiles.sum_parts,
            eps,
            *(tiles.outputs * tiles.pixels, tiles.pixels, 1),
            *strides(x),
            *strides(grad),
            *strides(grad_x),
            MULTIPLIER=tiles.outputs // tiles.channels,
            HEIGHT=tiles.height,
            WIDTH=tiles.width,
            KERNEL_HEIGHT=tiles.kernel[0],
            KERNEL_WIDTH=tiles.kernel[1],
            HAS_RESIDUAL=True,
            NORM=norm,
            PRECISION=precision(x),
            BLOCK_IMAGES=tiles.depthwise_images,
            BLOCK_PIXELS=tiles.block_pixels,
            PARTS=triton.next_power_of_2(tiles.parts),
            SUM_PARTS=triton.next_power_of_2(tiles.sum_parts),
        )
        reduce_partials[(triton.cdiv(columns, 128) + tiles.outputs,)](
            partials,
            matrices,
            biases,
            parameters,
            tiles.pointwise_programs,
            tiles.depthwise_blocks,
            tiles.outputs,
            LENGTH=columns,
            HEIGHT=tiles.height,
            WIDTH=tiles.width,
            KERNEL_HEIGHT=tiles.kernel[0],
            KERNEL_WIDTH=tiles.kernel[1],
            BLOCK_ROWS=32,
            BLOCK_COLUMNS=128,
            BLOCK_TAPS=triton.next_power_of_2(tiles.kernel[0] * tiles.kernel[1]),
            BLOCK_PIXELS=tiles.block_pixels,
        )
    return grad_x, parameters


def parameter_sizes(depthwise_weight: Tensor, weight: Tensor, projection: Tensor) -> list[int]:
    """Of the gradients of weight, projection, bias, projection_bias, depthwise_weight, depthwise_bias."""
    return [
        weight.numel(),
        projection.numel(),
        weight.shape[0],
        projection.shape[0],
        depthwise_weight.numel(),
        depthwise_weight.shape[0],
    ]


@convnext_block_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    weight: Tensor,
    projection: Tensor,
    h: Tensor,
    moments: Tensor,
    z: Tensor,
    norm: str,
    eps: float,
    approximate: str,
) -> tuple[Tensor, Tensor]:
    size = sum(parameter_sizes(depthwise_weight, weight, projection))
    return torch.empty_like(flat_pixels(x)), x.new_empty(size, dtype=accumulator(weight))


def _save_block(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, depthwise_weight, _, weight, _, projection, _, *ctx.options = inputs
    _, h, moments, z = output
    ctx.save_for_backward(x, depthwise_weight, weight, projection, h, moments, z)
    ctx.set_materialize_grads(False)


def _block_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    x, depthwise_weight, weight, projection, h, moments, z = ctx.saved_tensors
    grad_x, parameters = convnext_block_backward(
        grad, x, depthwise_weight, weight, projection, h, moments, z, *ctx.options
    )
    split = parameters.to(weight.dtype).split(parameter_sizes(depthwise_weight, weight, projection))
    grads = {
        0: grad_x,
        1: split[4].view(depthwise_weight.shape),
        2: split[5],
        3: split[0].view(weight.shape),
        4: split[2],
        5: split[1].view(projection.shape),
        6: split[3],
    }
    return *(grads[i] if needed else None for i, needed in enumerate(ctx.needs_input_grad[:7])), None, None, None


convnext_block_forward.register_autograd(_block_gradients, setup_context=_save_block)


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
    approximate: str = "none",
) -> Tensor:
    # The norm's affine map goes into the pointwise convolution that follows: W (g x^ + s) + b.
    weight, bias = pointwise_weight.flatten(1), pointwise_bias
    if norm_bias is not None:
        shift = weight @ norm_bias
        bias = shift if bias is None else bias + shift
    if norm_weight is not None:
        weight = weight * norm_weight
    y, *_ = convnext_block_forward(
        x,
        depthwise_weight,
        depthwise_bias,
        weight,
        bias,
        projection_weight.flatten(1),
        projection_bias,
        norm,
        eps,
        approximate,
    )
    return y
