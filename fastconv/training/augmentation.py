"""Random crops, flips and holes of the training images, on the device where the images live."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.training.recipe import Recipe
from fastconv.training.sets import generator


class Augmentation:
    """Crops images at random out of a black frame, mirrors every other one, and blackens a square of each.

    What happens to an image is drawn when an epoch starts, and is a function of seed, epoch and image: so a run
    that was stopped goes on with the same pictures, and a step reads only what lies on the device.

    Args:
        images: how many there are to train on.
        recipe: `crop` is the width of the frame in pixels, `flip` whether images are mirrored, `cutout` the side
            of the square in pixels. Its centre is anywhere in the image, so that a part of the square may lie
            outside: DeVries and Taylor, arXiv:1708.04552.
    """

    def __init__(self, images: int, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        # Where each image's crop begins, rows and columns of the framed image, and whether it is mirrored.
        self._corners = torch.zeros(2, images, dtype=torch.int64, device=device)
        self._mirrored = torch.zeros(images, dtype=torch.bool, device=device)
        # The row and the column of each square's centre, as shares of the image's height and width.
        self._centres = torch.zeros(2, images, device=device)

    def start(self, epoch: int) -> None:
        """Draw what happens to each image in an epoch, counted from 0."""
        random = generator(f"seed {self.recipe.seed} epoch {epoch} augmentation")
        last = 2 * self.recipe.crop
        self._corners.copy_(torch.randint(last + 1, self._corners.shape, generator=random))
        if self.recipe.cutout:
            self._centres.copy_(torch.rand(self._centres.shape, generator=random))
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
        found = found.view(pixels.shape)
        return found.masked_fill(self._squares(chosen, height, width), 0) if self.recipe.cutout else found

    def _squares(self, chosen: Tensor, height: int, width: int) -> Tensor:
        """Return which pixels lie in each image's square, bool [n, 1, height, width]."""
        inside = []
        for share, size in zip(self._centres[:, chosen, None], (height, width), strict=True):
            first = (share * size).long() - self.recipe.cutout // 2
            pixel = torch.arange(size, device=chosen.device)
            inside.append((first <= pixel) & (pixel < first + self.recipe.cutout))
        rows, columns = inside
        return (rows[:, :, None] & columns[:, None, :])[:, None]
