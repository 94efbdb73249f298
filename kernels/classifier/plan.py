"""A step of training and the evaluation of a batch as fixed lists of launches over memory that is allocated once.

There is no autograd; a call allocates nothing and reads nothing back, so a CUDA graph can capture it. Each sum is
taken in a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import Launch
from ..common.layout import strides
from ..common.placement import on_device_of
from ..head.tiling import HeadTiling
from ..layer_norm.tiling import LayerNormTiling
from ..optimizer.tiling import Columns, StepReduction, adamw_launch, end_evaluation_launch
from ..patches.tiling import DownsampleTiling, StemTiling
from .stage import EPS, BlockMaps, Call, Stage
from .state import BLOCK, State


class Batches(NamedTuple):
    """Images, and in which order batches take them: all contiguous, and on one device."""

    images: Tensor  # uint8 [M, I, H, W]
    labels: Tensor  # int64 [M]
    order: Tensor  # int64 [count], numbers of images
    position: Tensor  # int64 [1], where in `order` the next batch starts: a plan's call moves it on


class Plan:
    """The launches of one batch, of a classifier that `decisions.classifier` takes.

    float32 is multiplied as `torch.set_float32_matmul_precision` says when the plan is made.

    Args:
        weights: the parameters by name, contiguous, in the dtype of maps.
        batches: images, at least two patches of the stem high and wide.
        images: N, in the batch.

    Attributes:
        calls: the launches in order, each with its tensors.
    """

    def __init__(self, weights: Mapping[str, Tensor], batches: Batches, images: int) -> None:
        self.calls: list[Call] = []
        self._weights, self._batches, self._images = weights, batches, images
        # The results of the two convolutions of patches, and the maps of the stages that follow them.
        self._embedded = self._patch_maps("stem", batches.images)
        self._reduced = self._patch_maps("downsample", self._embedded)
        self._stem = StemTiling(batches.images, images, weights["stem.weight"])
        self._norm = LayerNormTiling(self._embedded, "tensor")
        self._downsample = DownsampleTiling(self._embedded, weights["downsample.weight"])
        self._head = HeadTiling(self._reduced, weights["bottleneck.bias"].numel())
        self._blocks = _blocks(weights, 1), _blocks(weights, 2)
        self._stages = Stage(self._embedded, self._blocks[0][0]), Stage(self._reduced, self._blocks[1][0])
        self._embedded_moments = self._stem.new_moments(self._embedded)
        self._moments = self._norm.new_moments(self._embedded)
        self._losses, self._correct = self._head.new_outcome(self._reduced)

    def __call__(self) -> None:
        """Launch on the current stream of the device.

        Raises:
            KernelError: a kernel does not compile, or the device cannot load it; `prepare` finds out before.
        """
        with on_device_of(self._embedded):
            for launch, tensors in self.calls:
                launch(*tensors)

    def prepare(self) -> None:
        """Compile and load all kernels, and launch none.

        Raises:
            KernelError: a kernel does not compile, or the device cannot load it.
        """
        with on_device_of(self._embedded):
            for launch, tensors in self.calls:
                launch.prepare(*tensors)

    def _patch_maps(self, name: str, x: Tensor) -> Tensor:
        """Uninitialised maps for the patches of x."""
        weight = self._weights[f"{name}.weight"]
        outputs, _, patch, _ = weight.shape
        return weight.new_empty(self._images, outputs, x.shape[2] // patch, x.shape[3] // patch)

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]

    def _forward(self, keep: bool) -> tuple[list[BlockMaps], list[BlockMaps]]:
        """Add the launches up to the head; return the maps of the blocks of both stages.

        Args:
            keep: whether each block has maps of its own, for a backward, or all share one set.
        """
        images, _, order, position = self._batches
        embedded, moments, norm = self._embedded, self._embedded_moments, self._norm
        x = torch.empty_like(embedded)
        self._add(self._stem.forward(), images, order, position, *self._parameters("stem"), embedded, moments)
        self._add(norm.normalise(strides(embedded), self._stem.parts, EPS, x), embedded, moments, x)
        first = self._forward_stage(0, x, keep)
        x = first[-1].y
        self._add(norm.moments(x), x, self._moments)
        downsample = self._downsample.forward(norm.parts, EPS)
        self._add(downsample, x, self._moments, *self._parameters("downsample"), self._reduced)
        return first, self._forward_stage(1, self._reduced, keep)

    def _forward_stage(self, number: int, x: Tensor, keep: bool) -> list[BlockMaps]:
        stage, blocks = self._stages[number], self._blocks[number]
        # Without a backward a block writes its result in the place of its input.
        maps = [stage.new_maps(x, torch.empty_like(x) if keep else x)]
        for _ in blocks[1:]:
            maps.append(stage.new_maps(maps[-1].y, torch.empty_like(x)) if keep else maps[0])
        for block, block_maps in zip(blocks, maps, strict=True):
            self.calls += stage.forward(block_maps, block)
        return maps

    def _add(self, launch: Launch, *tensors: Tensor | None) -> None:
        self.calls.append((launch, tensors))


class TrainingPlan(Plan):
    """A step of training: forward, loss, backward, and AdamW.

    Args:
        state: what the step changes.
        losses: [steps of an epoch]; the step writes its batch's mean loss at position // batch.
        correct: int64, one element, to which the number of the batch's correct answers is added.
        images: N, in this plan's batch.
        batch: images of each batch of an epoch but the last, which may have fewer.
    """

    def __init__(
        self, state: State, batches: Batches, losses: Tensor, correct: Tensor, images: int, batch: int
    ) -> None:
        super().__init__(state.weights, batches, images)
        first, second = (
            stage.partials * len(blocks) for stage, blocks in zip(self._stages, self._blocks, strict=True)
        )
        stem, downsample, head = self._stem, self._downsample, self._head
        reduction = StepReduction(
            [
                Columns(stem.partials, stem.length),
                *first,
                Columns(downsample.partials, downsample.length),
                *second,
                Columns(head.programs, head.length),
            ]
        )
        workspace = state.parameters.new_empty(reduction.size)
        self._backward(*self._forward(keep=True), reduction.views(workspace))

        position = batches.position
        self._add(
            reduction.launch(head.programs, images, batch, parameters=len(state.weights)),
            workspace,
            reduction.table().to(workspace.device),
            self._losses,
            self._correct,
            position,
            state.gradients,
            losses,
            correct,
            state.steps,
        )
        self._add(
            adamw_launch(state.parameters.numel(), images, state.rounded is not None),
            state.parameters,
            state.gradients,
            state.exp_avg,
            state.exp_avg_sq,
            state.steps,
            state.hyperparameters,
            state.rounded,
            position,
        )

    def _backward(
        self, first: list[BlockMaps], second: list[BlockMaps], partials: Sequence[tuple[Tensor, ...]]
    ) -> None:
        """
        Args:
            first, second: the maps of the blocks of both stages.
            partials: where partial gradients are written, in the order of the parameters.
        """
        images, labels, order, position = self._batches
        norm, downsample, depth = self._norm, self._downsample, len(first)
        stem_partials, *first_partials = partials[: 1 + 2 * depth]
        downsample_partials, *second_partials, head_partials = partials[1 + 2 * depth :]

        x, grad = second[-1].y, torch.empty_like(self._reduced)
        self._add(
            self._head.forward_backward(),
            x,
            *self._parameters("bottleneck"),
            labels,
            order,
            position,
            self._losses,
            self._correct,
            grad,
            *head_partials,
        )
        self._backward_stage(1, grad, second, second_partials)

        x, moments, weight = first[-1].y, self._moments, self._weights["downsample.weight"]
        # The gradient of the normalised maps, in whose place that of x is written.
        g, sums = torch.empty_like(x), moments.new_empty(1, 2, downsample.partials)
        self._add(downsample.backward(norm.parts, EPS), grad, x, moments, weight, g, sums, *downsample_partials)
        self._add(norm.backward(g, x, norm.parts, downsample.partials, EPS, g), g, x, moments, sums, g)
        self._backward_stage(0, g, first, first_partials)

        embedded, moments, parts = self._embedded, self._embedded_moments, self._stem.parts
        sums = norm.new_sums(moments)
        self._add(norm.sums(g, strides(embedded), parts, EPS), g, embedded, moments, sums)
        stem = self._stem.backward(parts, norm.parts, EPS)
        self._add(stem, images, order, position, g, embedded, moments, sums, *stem_partials)

    def _backward_stage(
        self, number: int, grad: Tensor, maps: list[BlockMaps], partials: Sequence[tuple[Tensor, ...]]
    ) -> None:
        """Turn the gradient of a stage's result into that of its input, block by block."""
        stage = self._stages[number]
        g, sums = torch.empty_like(maps[0].h), stage.new_sums(maps[0])
        for i, block in reversed(list(enumerate(self._blocks[number]))):
            columns, matrices = partials[2 * i : 2 * i + 2]
            self.calls += stage.backward(grad, maps[i], block, g, sums, *columns, *matrices)


class EvaluationPlan(Plan):
    """The loss and the correct answers of a batch.

    Args:
        losses, correct, images, batch: as `TrainingPlan`'s.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        batches: Batches,
        losses: Tensor,
        correct: Tensor,
        images: int,
        batch: int,
    ) -> None:
        super().__init__(weights, batches, images)
        _, second = self._forward(keep=False)
        _, labels, order, position = batches
        bottleneck = self._parameters("bottleneck")
        outcome = self._losses, self._correct
        self._add(self._head.evaluate(), second[-1].y, *bottleneck, labels, order, position, *outcome, None, None)
        end = end_evaluation_launch(self._head.programs, images, batch)
        self._add(end, *outcome, position, losses, correct)


def _blocks(weights: Mapping[str, Tensor], stage: int) -> list[dict[str, Tensor]]:
    """The parameters of each block of a stage, by the names of BLOCK."""
    prefix = f"conv_block_{stage}"
    depth = sum(name.startswith(prefix) for name in weights) // len(BLOCK)
    return [{name: weights[f"{prefix}.{i}.{name}"] for name in BLOCK} for i in range(depth)]
