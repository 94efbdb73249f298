"""The learning rate of each step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv.training.recipe import Recipe


def has_schedule(recipe: Recipe) -> bool:
    """Whether the learning rate changes during a run."""
    return recipe.schedule != "constant" or recipe.warmup > 0


def rates(recipe: Recipe, epoch: int, steps: int) -> Tensor:
    """Return the learning rates of an epoch, float32 [steps].

    A warm-up rises in a line to the recipe's `lr`. After it "linear" falls in a line to zero, which it would reach
    one step after the last.

    Args:
        epoch: counted from 0.
        steps: of each epoch.
    """
    total = recipe.epochs * steps
    warmup = round(recipe.warmup * total)
    step = torch.arange(epoch * steps, (epoch + 1) * steps, dtype=torch.float64)
    rising = (step + 1) / (warmup + 1)
    falling = (total - step) / (total - warmup) if recipe.schedule == "linear" else torch.ones_like(step)
    return (recipe.lr * torch.where(step < warmup, rising, falling)).float()
