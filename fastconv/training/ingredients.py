"""What a recipe adds to the lecture's training steps, as parts of a step that a CUDA graph can hold."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastconv.training.augmentation import Augmentation
from fastconv.training.recipe import Recipe
from fastconv.training.schedule import has_schedule, rates


class Ingredients:
    """Augmentation, the learning rate's schedule, and the average of the weights, where the recipe has them.

    Args:
        model: whose weights are averaged; the average starts with those that it has now.
        optimizer: its learning rate is a tensor if the recipe has a schedule.
        images: how many there are to train on.
        steps: of each epoch.

    Attributes:
        averaged: the model of the averaged weights, or None.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, optimizer: Optimizer, images: int, steps: int, device: torch.device
    ) -> None:
        self._recipe, self._model, self._optimizer = recipe, model, optimizer
        augments = recipe.crop > 0 or recipe.flip or recipe.cutout > 0
        self._augmentation = Augmentation(images, recipe, device) if augments else None
        self._rates = torch.zeros(steps, device=device) if has_schedule(recipe) else None
        self.averaged = copy.deepcopy(model).requires_grad_(False) if recipe.ema > 0 else None
        self._update_average = get_ema_multi_avg_fn(recipe.ema)

    def start(self, epoch: int) -> None:
        """Get ready for the steps of an epoch, counted from 0."""
        if self._augmentation is not None:
            self._augmentation.start(epoch)
        if self._rates is not None:
            self._rates.copy_(rates(self._recipe, epoch, len(self._rates)))

    def augment(self, pixels: Tensor, chosen: Tensor) -> Tensor:
        """Return the training images `chosen`, int64 [n], as they are in this epoch; uint8 as they came."""
        return pixels if self._augmentation is None else self._augmentation(pixels, chosen)

    def set_rate(self, step: Tensor) -> None:
        """Set the learning rate of a step of the epoch, int64 [1], before the optimizer's step."""
        if self._rates is not None:
            for group in self._optimizer.param_groups:
                group["lr"].copy_(self._rates[step].squeeze())

    def average(self) -> None:
        """Let the average take in the weights, after the optimizer's step."""
        if self.averaged is not None:
            pair = [list(model.parameters()) for model in (self.averaged, self._model)]
            self._update_average(*pair, None)
