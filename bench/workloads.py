"""What is timed: operations, the block, the classifier, its training step and an epoch, at the lecture's shapes;
and the operation of ConvNeXts' stages, and training steps of a swapped ConvNeXt-T, at theirs.

Each workload has a reference module and a fused one with the same parameters, and a floor: the bytes that it must
move if each tensor is read or written once, and the operations that the convolutions' definitions take.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastconv
from fastconv.extras import import_extra
from fastconv.operations import reference

OPERATIONS = ("depthwise_conv_layer_norm", "pointwise_conv_gelu", "convnext_block")
# Training steps of a library's ConvNeXt-T.
CONVNEXTS = {"convnext_tiny": "torchvision", "timm_convnext_tiny": "timm"}
# The second measures optimizer steps, the third as many as an epoch of the lecture has.
CLASSIFIERS = ("classifier", "training_step", "epoch", *CONVNEXTS)
# Depthwise, with multiplier 1, and norm of each pixel.
STAGE = "depthwise_conv_channel_norm"
DIRECTIONS = ("forward", "backward", "both")

MULTIPLIER = 4
KERNEL = 7
DEPTH = 5
IMAGE = 32
CLASSES = 10
CONVNEXT_PATCH = 4
CONVNEXT_TINY_DEPTHS = (3, 3, 9, 3)
# 80 % of CIFAR-10's training images.
EPOCH_IMAGES = 40_000
BATCH_SIZES = (1, 8, 32, 128, 512, 1024)
# Tensors that AdamW reads and writes for each parameter: the parameter and two moments both ways, the gradient.
OPTIMIZER_ACCESSES = 7


class Workload(NamedTuple):
    """One thing to time.

    Args:
        level: one of OPERATIONS or CLASSIFIERS, or STAGE.
        images: of a batch.
        channels: of the block's input; for a classifier, its width.
        side: of the square maps; for a classifier, of the maps after its stem.
    """

    level: str
    images: int
    channels: int
    side: int

    def __str__(self) -> str:
        return f"{self.level}, {self.channels} channels, {self.side} x {self.side}, batch {self.images}"

    @property
    def directions(self) -> tuple[str, ...]:
        if self.level in OPERATIONS or self.level == STAGE:
            return DIRECTIONS
        return ("forward",) if self.level == "classifier" else ("both",)

    @property
    def steps(self) -> int:
        """Optimizer steps of one call."""
        return -(-EPOCH_IMAGES // self.images) if self.level == "epoch" else 1


class Cost(NamedTuple):
    """Elements moved, and operations, a multiplication with an addition being two."""

    elements: int
    flops: int

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.elements + other.elements, self.flops + other.flops)

    def times(self, count: int) -> Cost:
        return Cost(count * self.elements, count * self.flops)


class DepthwiseReference(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return reference.depthwise_conv_layer_norm(x, self.weight, self.bias)


class StageReference(fastconv.DepthwiseConvLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return reference.depthwise_conv_layer_norm(
            x,
            self.weight,
            self.bias,
            norm="channel",
            eps=self.eps,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
        )


class PointwiseReference(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return reference.pointwise_conv_gelu(x, self.weight, self.bias)


def make_modules(workload: Workload) -> tuple[nn.Module, nn.Module]:
    """The reference and the fused module, with the same random parameters: to be copied, not changed."""
    return _make_modules(workload._replace(images=1))


# Swapping a ConvNeXt-T takes ten seconds.
@functools.cache
def _make_modules(workload: Workload) -> tuple[nn.Module, nn.Module]:
    channels, hidden = workload.channels, MULTIPLIER * workload.channels
    plain: nn.Module
    fused: nn.Module
    torch.manual_seed(0)
    if workload.level == "depthwise_conv_layer_norm":
        plain = DepthwiseReference(channels, hidden, KERNEL, padding="same", groups=channels)
        fused = fastconv.DepthwiseConvLayerNorm(channels, MULTIPLIER, KERNEL)
    elif workload.level == "pointwise_conv_gelu":
        plain = PointwiseReference(hidden, channels, 1)
        fused = fastconv.PointwiseConvGELU(hidden, channels)
    elif workload.level == STAGE:
        plain, fused = (
            kind(channels, 1, KERNEL, norm="channel", eps=1e-6, affine=True)
            for kind in (StageReference, fastconv.DepthwiseConvLayerNorm)
        )
    elif workload.level in CONVNEXTS:
        # Without paths that are dropped at random, and with branches that count.
        if CONVNEXTS[workload.level] == "timm":
            timm = import_extra("timm")
            plain = timm.create_model("convnext_tiny", num_classes=CLASSES, ls_init_value=1.0, drop_path_rate=0.0)
        else:
            plain = import_extra("torchvision.models").convnext_tiny(
                num_classes=CLASSES, layer_scale=1.0, stochastic_depth_prob=0.0
            )
        fused = copy.deepcopy(plain)
        fastconv.swap(fused)
    elif workload.level == "convnext_block":
        plain, fused = reference.ConvNextBlock(channels), fastconv.ConvNextBlock(channels)
    else:
        sizes = {"width": channels, "depth": DEPTH, "patch": IMAGE // workload.side}
        plain, fused = reference.Classifier(**sizes), fastconv.Classifier(**sizes)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def input_shape(workload: Workload) -> tuple[int, int, int, int]:
    if workload.level in CLASSIFIERS:
        image = CONVNEXT_PATCH * workload.side if workload.level in CONVNEXTS else IMAGE
        return workload.images, 3, image, image
    wide = MULTIPLIER if workload.level == "pointwise_conv_gelu" else 1
    return workload.images, wide * workload.channels, workload.side, workload.side


def cost(workload: Workload, direction: str) -> Cost:
    """The least that a workload takes in a direction."""
    if workload.level in OPERATIONS or workload.level == STAGE:
        pixels = workload.images * workload.side**2
        return operation_cost(workload.level, pixels, workload.channels, direction)
    step = (convnext_cost if workload.level in CONVNEXTS else classifier_cost)(workload, direction)
    if workload.level == "classifier":
        return step
    parameters = sum(p.numel() for p in make_modules(workload)[0].parameters())
    return (step + Cost(OPTIMIZER_ACCESSES * parameters, 0)).times(workload.steps)


def operation_cost(operation: str, pixels: int, channels: int, direction: str) -> Cost:
    hidden = MULTIPLIER * channels
    depthwise = Cost((KERNEL**2 + 1) * hidden, 2 * pixels * hidden * KERNEL**2)
    pointwise = Cost((hidden + 1) * channels, 2 * pixels * hidden * channels)
    projection = Cost((channels + 1) * channels, 2 * pixels * channels**2)
    if operation == "depthwise_conv_layer_norm":
        return module_cost(pixels * channels, pixels * hidden, depthwise, direction)
    if operation == "pointwise_conv_gelu":
        return module_cost(pixels * hidden, pixels * channels, pointwise, direction)
    if operation == STAGE:
        taps = Cost((KERNEL**2 + 3) * channels, 2 * pixels * channels * KERNEL**2)
        return module_cost(pixels * channels, pixels * channels, taps, direction)
    return module_cost(pixels * channels, pixels * channels, depthwise + pointwise + projection, direction)


def module_cost(inputs: int, outputs: int, parameters: Cost, direction: str) -> Cost:
    """Forward reads inputs and parameters and writes outputs.

    Backward reads inputs, parameters and the outputs' gradient, writes the gradients of the first two, and
    multiplies twice as much.
    """
    forward = Cost(inputs + outputs + parameters.elements, parameters.flops)
    backward = Cost(2 * (inputs + parameters.elements) + outputs, 2 * parameters.flops)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def classifier_cost(workload: Workload, direction: str) -> Cost:
    """As if each of stem, blocks, downsampling and head were one operation."""
    images, width, side = workload.images, workload.channels, workload.side

    def patches(inputs: int, outputs: int, patch: int, side: int) -> Cost:
        return patches_cost(images, inputs, outputs, patch, side, direction)

    def blocks(channels: int, side: int) -> Cost:
        return operation_cost("convnext_block", images * side**2, channels, direction).times(DEPTH)

    total = patches(3, width, IMAGE // side, side) + blocks(width, side)
    total += patches(width, 2 * width, 2, side // 2) + blocks(2 * width, side // 2)
    return total + patches(2 * width, CLASSES, 1, side // 2)


def convnext_cost(workload: Workload, direction: str) -> Cost:
    """As if each block, and each convolution of patches with its norm, were one operation."""
    images, channels, side = workload.images, workload.channels, workload.side
    total = patches_cost(images, 3, channels, CONVNEXT_PATCH, side, direction)
    for stage, depth in enumerate(CONVNEXT_TINY_DEPTHS):
        if stage > 0:
            total += patches_cost(images, channels, 2 * channels, 2, side // 2, direction)
            channels, side = 2 * channels, side // 2
        pixels = images * side**2
        taps = Cost((KERNEL**2 + 3) * channels, 2 * pixels * channels * KERNEL**2)
        # Two products, with their biases and the layer scale.
        products = Cost(8 * channels**2 + 6 * channels, 16 * pixels * channels**2)
        total += module_cost(pixels * channels, pixels * channels, taps + products, direction).times(depth)
    return total + module_cost(images * channels, images * CLASSES, Cost((channels + 1) * CLASSES, 0), direction)


def patches_cost(images: int, inputs: int, outputs: int, patch: int, side: int, direction: str) -> Cost:
    """Of a convolution of patches, to maps of `side`."""
    pixels, taps = images * side**2, inputs * patch**2
    weight = Cost((taps + 1) * outputs, 2 * pixels * taps * outputs)
    return module_cost(pixels * taps, pixels * outputs, weight, direction)


# channels and side: the lecture's two stages; then those of the homework's variants, patch 2 and width 64.
LECTURE = ((32, 8), (64, 4))
HOMEWORK = ((32, 16), (64, 8), (128, 4))


def full() -> list[Workload]:
    workloads = [
        Workload(level, images, *shape) for level in OPERATIONS for shape in LECTURE for images in BATCH_SIZES
    ]
    workloads += [Workload(level, 128, *shape) for level in OPERATIONS for shape in HOMEWORK]
    for level in ("classifier", "training_step"):
        workloads += [Workload(level, images, *LECTURE[0]) for images in BATCH_SIZES]
        # Patch 2, and width 64.
        workloads += [Workload(level, 128, 32, 16), Workload(level, 128, 64, 8)]
    return [*workloads, Workload("epoch", 128, *LECTURE[0]), *convnext(8)]


def convnext(images: int) -> list[Workload]:
    """The stages of a ConvNeXt-T for 224x224, and a training step of each library's that is installed."""
    workloads = [Workload(STAGE, images, 96 << stage, 56 >> stage) for stage in range(4)]
    whole = [level for level, library in CONVNEXTS.items() if importlib.util.find_spec(library)]
    return workloads + [Workload(level, images, 96, 56) for level in whole]


def quick() -> list[Workload]:
    """The most important first: a run may be cut short."""
    channels, side = LECTURE[0]
    levels = ("training_step", "convnext_block", "classifier", "depthwise_conv_layer_norm", "pointwise_conv_gelu")
    workloads = [Workload(level, 128, channels, side) for level in levels]
    return [*workloads, *(Workload("convnext_block", images, channels, side) for images in (1, 8, 32, 512, 1024))]
