"""Random crops and flips of the training images, on the device where the images live."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.training.recipe import Recipe
from fastconv.training.sets import generator


class Augmentation:
    """Crops images at random out of a black frame, and mirrors every other one.

    What happens to an image is drawn when an epoch starts, and is a function of seed, epoch and image: so a run
    that was stopped goes on with the same pictures, and a step reads only what lies on the device.

    Args:
        images: how many there are to train on.
        recipe: `crop` is the width of the frame in pixels, `flip` whether images are mirrored.
    """

    def __init__(self, images: int, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        # Where each image's crop begins, rows and columns of the framed image, and whether it is mirrored.
        self._corners = torch.zeros(2, images, dtype=torch.int64, device=device)
        self._mirrored = torch.zeros(images, dtype=torch.bool, device=device)

    def start(self, epoch: int) -> None:
        """Draw what happens to each image in an epoch, counted from 0."""
        random = generator(f"seed {self.recipe.seed} epoch {epoch} augmentation")
        last = 2 * self.recipe.crop
        self._corners.copy_(torch.randint(last + 1, self._corners.shape, generator=random))
        if self.recipe.flip:
            self._mirrored.copy_(torch.randint(2, self._mirrored.shape, generator=random))

    def __call__(self, pixels: Tensor, chosen: Tensor) -> Tensor:
        """Return the images as they are in this epoch.

        Args:
            pixels: uint8 [n, channels, height, width].
            chosen: int64 [n], which of the images to train on they are.
        """
        _, channels, height, width = pixels.shape
        framed = F.pad(pixels, (self.recipe.crop,) * 4)
        top, left = self._corners[:, chosen, None]
        rows = top + torch.arange(height, device=pixels.device)
        columns = left + torch.arange(width, device=pixels.device)
        columns = torch.where(self._mirrored[chosen, None], columns.flip(1), columns)
        # One index for all channels of a pixel: on a CPU several times as fast as indexing rows and columns.
        places = (rows[:, :, None] * framed.shape[3] + columns[:, None, :]).flatten(1)
        found = framed.flatten(2).gather(2, places[:, None].expand(-1, channels, -1))
        return found.view(pixels.shape)
