"""What is timed: operations, the block, the classifier, its training step and an epoch, at the lecture's shapes;
and at a ConvNeXt-T's shapes the operation of its stages, and training steps of the whole network.

Each kind of workload is a class, which makes a reference module and a fused one with the same parameters and
computes the least that they cost (`costs.py`). To add a kind, write its class, name it in KINDS and list its sizes
in `full`.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

import fastconv
from fastconv.checking import definitions
from fastconv.extras import import_extra
from fastconv.operations import reference

from . import costs
from .costs import Cost

# The directions that are timed, in words.
DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward and backward"}

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


@dataclass(frozen=True)
class Workload(ABC):
    """One thing to time.

    Args:
        images: in a batch.
        channels: of the block's input; for a network, its width.
        side: of the square maps, in pixels; for a network, of the maps after its stem.
    """

    images: int
    channels: int
    side: int

    # The kind's name in titles and in files of results.
    level: ClassVar[str]
    directions: ClassVar[tuple[str, ...]]
    # Whether it maps images to class scores. Its parameters are float32, and autocast rounds, as in training.
    classifies: ClassVar[bool] = False
    # Whether a call takes optimizer steps, instead of going forward or backward only.
    trains: ClassVar[bool] = False
    # Whether a call takes an epoch's steps: long enough to be timed once, without a warm-up.
    is_epoch: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"{self.level}, {self.channels} channels, {self.side} x {self.side}, batch {self.images}"

    def task(self, direction: str) -> str:
        """What a call does, as titles name it; a call that trains has only one direction."""
        return self.level if self.trains else f"{self.level}, {DIRECTIONS[direction]}"

    def as_row(self) -> dict[str, Any]:
        """What identifies the workload in a row of results."""
        return {"level": self.level, **asdict(self)}

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """The reference and the fused module, with the same random parameters: to be copied, not changed."""
        return _modules(replace(self, images=1))

    @abstractmethod
    def make_modules(self) -> tuple[nn.Module, nn.Module]:
        """The reference and the fused module, each with the parameters that it is made with."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""

    @abstractmethod
    def cost(self, direction: str) -> Cost:
        """The least that a call costs in one of `directions`."""


# Swapping a ConvNeXt-T takes ten seconds.
@functools.cache
def _modules(workload: Workload) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain, fused = workload.make_modules()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


class Operation(Workload):
    """An operation by itself, on maps that have a gradient too."""

    directions = tuple(DIRECTIONS)
    # Channels of the input and of the output, as multiples of `channels`.
    widths: ClassVar[tuple[int, int]] = (1, 1)

    @property
    def pixels(self) -> int:
        return self.images * self.side**2

    @property
    @abstractmethod
    def parameters(self) -> Cost:
        """The sum of its `costs.convolution`s."""

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.images, self.widths[0] * self.channels, self.side, self.side

    def cost(self, direction: str) -> Cost:
        inputs, outputs = (width * self.channels * self.pixels for width in self.widths)
        return costs.module(inputs, outputs, self.parameters, direction)


class DepthwiseConvLayerNorm(Operation):
    level = "depthwise_conv_layer_norm"
    widths = (1, MULTIPLIER)

    def make_modules(self) -> tuple[nn.Module, nn.Module]:
        sizes = self.channels, MULTIPLIER, KERNEL
        return definitions.DepthwiseConvLayerNorm(*sizes), fastconv.DepthwiseConvLayerNorm(*sizes)

    @property
    def parameters(self) -> Cost:
        return costs.convolution(KERNEL**2, MULTIPLIER * self.channels, self.pixels)


class PointwiseConvGELU(Operation):
    level = "pointwise_conv_gelu"
    widths = (MULTIPLIER, 1)

    def make_modules(self) -> tuple[nn.Module, nn.Module]:
        sizes = MULTIPLIER * self.channels, self.channels
        return definitions.PointwiseConvGELU(*sizes), fastconv.PointwiseConvGELU(*sizes)

    @property
    def parameters(self) -> Cost:
        return costs.convolution(MULTIPLIER * self.channels, self.channels, self.pixels)


class ConvNextBlock(Operation):
    level = "convnext_block"

    def make_modules(self) -> tuple[nn.Module, nn.Module]:
        return reference.ConvNextBlock(self.channels), fastconv.ConvNextBlock(self.channels)

    @property
    def parameters(self) -> Cost:
        hidden = MULTIPLIER * self.channels
        depthwise = costs.convolution(KERNEL**2, hidden, self.pixels)
        pointwise = costs.convolution(hidden, self.channels, self.pixels)
        projection = costs.convolution(self.channels, self.channels, self.pixels)
        return depthwise + pointwise + projection


class Stage(Operation):
    """The operation of a ConvNeXt's stages: depthwise, with multiplier 1, and the norm of each pixel."""

    level = "depthwise_conv_channel_norm"

    def make_modules(self) -> tuple[nn.Module, nn.Module]:
        arguments = self.channels, 1, KERNEL, "channel", 1e-6, True
        return definitions.DepthwiseConvLayerNorm(*arguments), fastconv.DepthwiseConvLayerNorm(*arguments)

    @property
    def parameters(self) -> Cost:
        return costs.convolution(KERNEL**2, self.channels, self.pixels, vectors=3)


class Network(Workload):
    """A network that classifies images."""

    classifies = True

    @abstractmethod
    def pass_cost(self, direction: str) -> Cost:
        """The least that the network itself costs, without an optimizer."""

    def cost(self, direction: str) -> Cost:
        if not self.trains:
            return self.pass_cost(direction)
        parameters = sum(p.numel() for p in self.modules()[0].parameters())
        return self.pass_cost(direction) + Cost(OPTIMIZER_ACCESSES * parameters, 0)


class Classifier(Network):
    """The lecture's classifier, without gradients."""

    level = "classifier"
    directions = ("forward",)

    def make_modules(self) -> tuple[nn.Module, nn.Module]:
        sizes = self.channels, DEPTH, IMAGE // self.side
        return reference.Classifier(*sizes), fastconv.Classifier(*sizes)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.images, 3, IMAGE, IMAGE

    def pass_cost(self, direction: str) -> Cost:
        """The cost if each of stem, blocks, downsampling and head is one operation."""
        images, width, side = self.images, self.channels, self.side
        stem = costs.patches(images, 3, width, IMAGE // side, side, direction)
        first = ConvNextBlock(images, width, side).cost(direction).times(DEPTH)
        downsampling = costs.patches(images, width, 2 * width, 2, side // 2, direction)
        second = ConvNextBlock(images, 2 * width, side // 2).cost(direction).times(DEPTH)
        head = costs.patches(images, 2 * width, CLASSES, 1, side // 2, direction)
        return stem + first + downsampling + second + head


class TrainingStep(Classifier):
    """An optimizer step of the lecture's training."""

    level = "training_step"
    directions = ("both",)
    trains = True


class Epoch(TrainingStep):
    """All optimizer steps of an epoch of the lecture's training."""

    level = "epoch"
    is_epoch = True

    def cost(self, direction: str) -> Cost:
        return super().cost(direction).times(-(-EPOCH_IMAGES // self.images))


class ConvNextTiny(Network):
    """An optimizer step of a library's ConvNeXt-T."""

    directions = ("both",)
    trains = True
    library: ClassVar[str]

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        image = CONVNEXT_PATCH * self.side
        return self.images, 3, image, image

    def make_modules(self) -> tuple[nn.Module, nn.Module]:
        plain = self.make_model()
        fused = copy.deepcopy(plain)
        fastconv.swap(fused)
        return plain, fused

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The library's model, without paths that are dropped at random, and with branches that count."""

    def pass_cost(self, direction: str) -> Cost:
        """The cost if each block, and each convolution of patches with its norm, is one operation."""
        images, channels, side = self.images, self.channels, self.side
        total = costs.patches(images, 3, channels, CONVNEXT_PATCH, side, direction)
        for stage, depth in enumerate(CONVNEXT_TINY_DEPTHS):
            if stage > 0:
                total += costs.patches(images, channels, 2 * channels, 2, side // 2, direction)
                channels, side = 2 * channels, side // 2
            pixels = images * side**2
            depthwise = costs.convolution(KERNEL**2, channels, pixels, vectors=3)
            expansion = costs.convolution(channels, 4 * channels, pixels)
            # The second vector is the layer scale.
            projection = costs.convolution(4 * channels, channels, pixels, vectors=2)
            block = depthwise + expansion + projection
            total += costs.module(pixels * channels, pixels * channels, block, direction).times(depth)
        # The head multiplies next to nothing.
        head = Cost((channels + 1) * CLASSES, 0)
        return total + costs.module(images * channels, images * CLASSES, head, direction)


class TorchvisionConvNextTiny(ConvNextTiny):
    level = "convnext_tiny"
    library = "torchvision"

    def make_model(self) -> nn.Module:
        models = import_extra("torchvision.models")
        return models.convnext_tiny(num_classes=CLASSES, layer_scale=1.0, stochastic_depth_prob=0.0)


class TimmConvNextTiny(ConvNextTiny):
    level = "timm_convnext_tiny"
    library = "timm"

    def make_model(self) -> nn.Module:
        timm = import_extra("timm")
        return timm.create_model("convnext_tiny", num_classes=CLASSES, ls_init_value=1.0, drop_path_rate=0.0)


OPERATIONS = (DepthwiseConvLayerNorm, PointwiseConvGELU, ConvNextBlock)
CONVNEXTS = (TorchvisionConvNextTiny, TimmConvNextTiny)
KINDS: dict[str, type[Workload]] = {
    kind.level: kind for kind in (*OPERATIONS, Stage, Classifier, TrainingStep, Epoch, *CONVNEXTS)
}


def of_row(row: Mapping[str, Any]) -> Workload:
    """The workload of a row of results."""
    return KINDS[row["level"]](row["images"], row["channels"], row["side"])


# channels and side: the lecture's two stages; then those of the homework's variants, patch 2 and width 64.
LECTURE = ((32, 8), (64, 4))
HOMEWORK = ((32, 16), (64, 8), (128, 4))


def full() -> list[Workload]:
    workloads: list[Workload] = []
    workloads += [kind(images, *shape) for kind in OPERATIONS for shape in LECTURE for images in BATCH_SIZES]
    workloads += [kind(128, *shape) for kind in OPERATIONS for shape in HOMEWORK]
    for network in (Classifier, TrainingStep):
        workloads += [network(images, *LECTURE[0]) for images in BATCH_SIZES]
        # With patch 2, and with width 64.
        workloads += [network(128, 32, 16), network(128, 64, 8)]
    return [*workloads, Epoch(128, *LECTURE[0]), *convnext(8)]


def convnext(images: int) -> list[Workload]:
    """The stages of a ConvNeXt-T for 224x224, and a training step of each library's that is installed."""
    installed = [kind for kind in CONVNEXTS if importlib.util.find_spec(kind.library)]
    stages = [Stage(images, 96 << stage, 56 >> stage) for stage in range(4)]
    return [*stages, *(kind(images, 96, 56) for kind in installed)]


def quick() -> list[Workload]:
    """The most important first: a run may be cut short."""
    kinds = (TrainingStep, ConvNextBlock, Classifier, DepthwiseConvLayerNorm, PointwiseConvGELU)
    workloads: list[Workload] = [kind(128, *LECTURE[0]) for kind in kinds]
    return [*workloads, *(ConvNextBlock(images, *LECTURE[0]) for images in (1, 8, 32, 512, 1024))]
