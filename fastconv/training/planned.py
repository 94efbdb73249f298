"""Steps as fixed lists of Triton launches: no autograd, no operation of PyTorch, one launch for the optimizer."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import torch

from fastconv.kernels import decisions
from fastconv.kernels.common.errors import KernelError
from fastconv.operations import backends
from fastconv.training import plan_selftest
from fastconv.training.recipe import DTYPES, INGREDIENTS, Recipe
from fastconv.training.stepper import AutogradStepper, Stepper


class PlannedStepper:
    """Steps of a classifier whose every launch is known beforehand: `fastconv.kernels.classifier`.

    Args:
        stepper: whose model, optimizer, batches and tallies it takes over. Parameters and the optimizer's state
            keep their values, but lie in flat vectors from now on.
    """

    def __init__(self, stepper: AutogradStepper) -> None:
        # Not at the top: there may be no Triton.
        from fastconv.kernels.classifier import plan
        from fastconv.kernels.classifier.state import State

        assert stepper.optimizer is not None
        self._plan = plan
        self.batches, self.trained, self.evaluated = stepper.batches, stepper.trained, stepper.evaluated
        self.flat = State(stepper.model, stepper.optimizer, DTYPES[stepper.recipe.precision])
        images = self.batches.images
        self._feed = plan.Batches(images.images, images.labels, self.batches.order, self.batches.position)
        self._training: dict[int, plan.TrainingPlan] = {}
        self._evaluations: dict[int, plan.EvaluationPlan] = {}

    def train(self, size: int) -> None:
        self.plan_training(size)()

    def evaluate(self, size: int) -> None:
        self.plan_evaluation(size)()

    def plan_training(self, size: int) -> Any:
        """The plan of a step of that many images."""
        if size not in self._training:
            tally, batch_size = self.trained, self.batches.batch_size
            self._training[size] = self._plan.TrainingPlan(
                self.flat, self._feed, tally.losses, tally.correct, size, batch_size
            )
        return self._training[size]

    def plan_evaluation(self, size: int) -> Any:
        if size not in self._evaluations:
            tally, batch_size = self.evaluated, self.batches.batch_size
            self._evaluations[size] = self._plan.EvaluationPlan(
                self.flat.weights, self._feed, tally.losses, tally.correct, size, batch_size
            )
        return self._evaluations[size]


def planned(stepper: AutogradStepper, size: int, note: Callable[[str], None]) -> Stepper:
    """Return a stepper that runs the same steps as plans, if Triton's kernels can; else the same one.

    Args:
        size: images of most steps.
        note: called with the reason if kernels that should be able to are not.
    """
    device, dtype = stepper.batches.position.device, DTYPES[stepper.recipe.precision]
    # A plan knows no other process's gradients.
    if stepper.batches.ranks.count > 1:
        return stepper
    if backends.select("convnext_block", device, dtype) != "triton" or not fits(stepper):
        return stepper
    found = PlannedStepper(stepper)
    try:
        found.plan_training(size).prepare()
        reason = plan_selftest.why_wrong(stepper, size, PlannedStepper)
    except KernelError as error:
        reason = f"kernel {error.kernel} cannot run ({textwrap.shorten(error.reason, 300)})"
    except torch.cuda.OutOfMemoryError:
        reason = f"there is too little memory for a plan of {size:,} images"
    if reason is None:
        return found
    note(f"Steps run operation by operation, not as one plan of Triton launches: {reason}")
    return stepper


def fits(stepper: AutogradStepper) -> bool:
    """Whether there are kernels for whole steps of the model."""
    *_, height, width = stepper.batches.images.images.shape
    recipe = stepper.recipe
    if any(getattr(recipe, name) != getattr(Recipe, name) for name in INGREDIENTS):
        return False
    pixels = (height // recipe.patch) * (width // recipe.patch)
    return decisions.classifier(stepper.model.norm, recipe.width, pixels) == "plan"
