"""The images of a run on its device, which of them are for what, and the batches that are cut out of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastconv.training.data import DataError, Dataset, ImageSet, split_indices
from fastconv.training.ranks import ALONE, Ranks
from fastconv.training.recipe import Recipe


@dataclass(frozen=True)
class Sets:
    """All images of a run, and the ranges of those to train, validate and test on.

    Within its range each set is in a random order that is a function of the split seed: the layer norm spans the
    batch, so that of images that lie class by class, as in a folder, each batch would be normalised by its class.
    """

    images: ImageSet
    train: range
    validation: range
    test: range


def make_sets(dataset: Dataset, recipe: Recipe, device: torch.device) -> Sets:
    """Split the training images by the recipe, and copy what it uses to the device.

    Raises:
        DataError: there are too few to validate on.
    """
    check_count(dataset)
    count = len(dataset.train)
    # The lecture's split is a random order itself.
    train, validation = split_indices(count, recipe.split_seed)
    test = random_order(len(dataset.test), f"test {recipe.split_seed}")
    train, validation, test = (order[: recipe.limit] for order in (train, validation, test))
    ends = list(itertools.accumulate(map(len, (train, validation, test))))
    seen = torch.cat([train, validation])
    # Several times as fast as indexing.
    images = torch.cat([dataset.train.images.index_select(0, seen), dataset.test.images.index_select(0, test)])
    labels = torch.cat([dataset.train.labels[seen], dataset.test.labels[test]])
    return Sets(
        ImageSet(images, labels).to(device), *itertools.starmap(range, zip([0, *ends], ends, strict=False))
    )


def check_count(dataset: Dataset) -> None:
    """Raise DataError if there are too few images to validate on: a fifth of those to train on, rounded down."""
    if (count := len(dataset.train)) < 5:
        raise DataError(f"{dataset.source}: {count} training images leave none to validate on; expected 5 or more")


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's images, int64 [images]: a function of seed and epoch, so nothing to save."""
    return random_order(images, f"seed {seed} epoch {epoch}")


def random_order(images: int, name: str) -> Tensor:
    """Return a random permutation, int64 [images], which the name decides."""
    return torch.randperm(images, generator=generator(name))


def generator(name: str) -> torch.Generator:
    """Return a generator of random numbers, which the name decides."""
    # PyTorch's CPU generator looks at 32 bits of its seed only. Python's hashes a string to seed itself.
    return torch.Generator().manual_seed(random.Random(name).getrandbits(32))


class Batches:
    """Cuts batches out of images, in an order and from a position that lie on the device beside them.

    Args:
        images: all that batches may hold.
        batch_size: images of each batch but the last one of an order, which holds what is left.
        ranks: the processes of the run, each of which gets its part of every batch, perhaps an empty one.

    Attributes:
        order: int64 [at most len(images)], which images to visit.
        position: int64 [1], how many of them have been visited.
    """

    def __init__(self, images: ImageSet, batch_size: int, ranks: Ranks = ALONE) -> None:
        device = images.images.device
        self.images, self.batch_size, self.ranks = images, batch_size, ranks
        self.order = torch.zeros(len(images), dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._offsets = torch.arange(batch_size, device=device)

    def start(self, order: Tensor, position: int = 0) -> list[int]:
        """Go to a position of an order; return the sizes of the batches from there on.

        Args:
            order: int64 [n], at most as many as there are images.
        """
        count = len(order)
        self.order[:count] = order.to(self.order.device)
        self.position.fill_(position)
        return [min(self.batch_size, count - start) for start in range(position, count, self.batch_size)]

    def example(self) -> Tensor:
        """Return black images, as many as this process has of a whole batch."""
        size = min(self.batch_size, len(self.images))
        count = len(range(size)[self.ranks.part(size)])
        return torch.zeros(count, *self.images.images.shape[1:], device=self.order.device)

    def next(self, size: int, augment: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return this process's part of the next `size` images, and go on behind them all.

        Args:
            augment: changes the images, given their bytes and which they are.

        Returns:
            Images, float32 [n, 3, height, width] in [0, 1], and their labels, int64 [n].
        """
        chosen = self.order[self.position + self._offsets[self.ranks.part(size)]]
        self.position += size
        # On a CPU twice as fast as indexing.
        pixels = self.images.images.index_select(0, chosen)
        if augment is not None:
            pixels = augment(pixels, chosen)
        return pixels.float().div_(255), self.images.labels[chosen]
