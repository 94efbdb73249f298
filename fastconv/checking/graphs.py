"""Trains once step by step and once by CUDA graphs: not a bit may differ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastconv.training import loop
from fastconv.training.data import CIFAR10_CLASSES, Dataset, ImageSet
from fastconv.training.graphed import Graph
from fastconv.training.recipe import Recipe

# The second epoch captures, the third replays. The last batch of each set is a smaller one.
RECIPE = Recipe(epochs=3, batch_size=32)
IMAGES, TEST_IMAGES = 250, 10
# What the two runs of a training call `stepped` for.
STEPS = 2 * RECIPE.epochs


def compare(device: torch.device, stepped: Callable[[], None]) -> str | None:
    """Return what differs between a training without graphs and one with them; None if nothing does.

    Raises:
        CaptureError: a step cannot be captured.
    """
    eager, replayed = (train(device, graph, stepped) for graph in ("off", "on"))
    for name, expected in eager.items():
        if not torch.equal(replayed[name], expected):
            return f"{name} differs between steps in a CUDA graph and the same steps without"
    return None


def train(device: torch.device, graph: Graph, stepped: Callable[[], None]) -> dict[str, Tensor]:
    """Return the losses of all steps, those of evaluations, and the weights."""
    state = loop.prepare(RECIPE, pictures(IMAGES, TEST_IMAGES), device, None)
    losses, evaluated = [], []

    def refuse(reason: str) -> None:
        raise AssertionError(reason)

    state.choose_steps(graph, refuse)
    for _ in range(RECIPE.epochs):
        for size in state.rest_of_epoch():
            state.train(size)
        losses.append(state.losses.clone())
        validation = state.evaluate(state.sets.validation, lambda done: None)
        evaluated.append(torch.tensor(validation, dtype=torch.float64))
        state.end_epoch(state.running_metrics(), validation)
        stepped()
    weights = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    return {"the loss": torch.cat(losses), "an evaluation": torch.cat(evaluated), **weights}


def pictures(train: int, test: int) -> Dataset:
    """So many random images of CIFAR-10's size and classes, to train on and to test on."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.randint(len(CIFAR10_CLASSES), (count,), generator=generator))

    return Dataset(images(train), images(test), CIFAR10_CLASSES, "random pictures")
