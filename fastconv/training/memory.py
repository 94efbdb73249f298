"""How much memory a training takes at least, so that one that cannot fit is refused before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastconv import machine
from fastconv.training.recipe import Recipe, shape_of_model

# A weight, its gradient and AdamW's two moments, each of four bytes.
BYTES_PER_PARAMETER = 16
GIB = 2**30


def check(
    recipe: Recipe, image_size: Sequence[int], classes: int, images: int, device: torch.device, processes: int = 1
) -> None:
    """Raise ValueError if a device cannot hold the training of a model.

    Args:
        image_size: channels, height and width.
        images: how many the data set has to train and validate on.
        processes: how many share each batch.
    """
    available = machine.memory(device)
    parameters = sum(each.numel() for each in shape_of_model(recipe, image_size, classes).parameters())
    # A fifth of the images is for validation.
    batch = math.ceil(min(recipe.batch_size, images * 4 // 5, recipe.limit or images) / processes)
    needed = BYTES_PER_PARAMETER * parameters + activations(recipe, image_size, batch)
    if available is not None and needed > available:
        raise ValueError(
            f"a model of {parameters:,} parameters, trained on {batch:,} images at a time, takes at least "
            f"{needed / GIB:,.1f} GiB; {device} has {available / GIB:,.1f}: "
            "give a smaller --width, --depth or --batch-size"
        )


def activations(recipe: Recipe, image_size: Sequence[int], batch: int) -> int:
    """Return the bytes of the depthwise convolutions' outputs, which every block keeps for its backward."""
    _, height, width = (size // recipe.patch for size in image_size)
    first = 4 * recipe.width * height * width
    second = 4 * 2 * recipe.width * (height // 2) * (width // 2)
    return batch * recipe.depth * (first + second) * (2 if recipe.precision == "bf16" else 4)
