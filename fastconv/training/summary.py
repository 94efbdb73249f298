"""What torchinfo reports of a recipe's classifier: layers, parameters, and multiplications."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from fastconv.extras import import_extra
from fastconv.operations import reference
from fastconv.training.recipe import Recipe


def model_summary(recipe: Recipe, image_size: Sequence[int], classes: int, depth: int) -> str:
    """Return torchinfo's table of the layers on a whole batch, down to a depth of nested modules."""
    return str(_statistics(recipe, image_size, classes, recipe.batch_size, depth))


def multiplications(recipe: Recipe, image_size: Sequence[int], classes: int) -> int:
    """Return how many multiplications and additions one image's forward takes, a pair counted as one."""
    return _multiplications(recipe.width, recipe.depth, recipe.patch, tuple(image_size), classes)


# A sweep has many recipes of few shapes.
@lru_cache
def _multiplications(width: int, depth: int, patch: int, image_size: tuple[int, ...], classes: int) -> int:
    recipe = Recipe(width=width, depth=depth, patch=patch)
    return _statistics(recipe, image_size, classes, images=1, depth=1).total_mult_adds


def _statistics(recipe: Recipe, image_size: Sequence[int], classes: int, images: int, depth: int) -> Any:
    """Run torchinfo on the lecture's layers, which the fused modules merge."""
    # It runs the model. On the meta device that takes no memory, however wide the model or large the batch.
    with torch.device("meta"):
        model = reference.Classifier(recipe.width, recipe.depth, recipe.patch, image_size[0], classes)
        inputs = torch.empty(images, *image_size)
    return import_extra("torchinfo").summary(
        model,
        input_data=inputs,
        device="meta",
        depth=depth,
        col_names=("output_size", "num_params", "mult_adds"),
        col_width=18,
        row_settings=("var_names",),
        verbose=0,
    )
