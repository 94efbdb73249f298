"""A classifier's planned steps on one batch of random pictures, for tools that compile, count or time them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastconv.kernels.classifier.plan import Batches, EvaluationPlan, Plan, TrainingPlan
from fastconv.kernels.classifier.state import State
from fastconv.modules import Classifier

CLASSES = 10


class Sizes(NamedTuple):
    """The defaults are the lecture's."""

    images: int = 128
    side: int = 32
    width: int = 32
    depth: int = 5
    patch: int = 4


LECTURE = Sizes()


class PlannedSteps:
    """Plans of a new model, the same at each call but for `dtype`.

    Each call of a plan moves on by a batch, and there is only one: `repeated` goes back before.

    Args:
        dtype: of maps, and of the parameters that kernels read.

    Attributes:
        state: what training changes.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", sizes: Sizes = LECTURE) -> None:
        images, side, width, depth, patch = sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Classifier(width, depth, patch, num_classes=CLASSES).to(device)
            pixels = torch.randint(256, (images, 3, side, side), dtype=torch.uint8)
            labels = torch.randint(CLASSES, (images,))
        self.state = State(model, torch.optim.AdamW(model.parameters()), dtype)
        order, position = torch.arange(images), torch.zeros(1, dtype=torch.int64)
        self._batches = Batches(*(x.to(device) for x in (pixels, labels, order, position)))
        losses, correct = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        self._batch = self._batches, losses, correct, images, images

    def training(self) -> TrainingPlan:
        return TrainingPlan(self.state, *self._batch)

    def evaluation(self) -> EvaluationPlan:
        return EvaluationPlan(self.state.weights, *self._batch)

    def repeated(self, plan: Plan) -> Callable[[int], None]:
        """A plan as a call to time, which takes the same batch each time, whatever number it is given."""

        def call(_: int) -> None:
            self._batches.position.zero_()
            plan()

        return call
