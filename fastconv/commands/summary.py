"""`fastconv summary`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastconv.commands.options import MODEL, recipe_options, usage_errors
from fastconv.training import data
from fastconv.training.recipe import Recipe, check_images
from fastconv.training.summary import model_summary


@recipe_options(*MODEL)
def summary(
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = Recipe.batch_size, **model: Any
) -> None:
    """Print the layers and parameters of the classifier, for CIFAR-10."""
    image_size = (3, 32, 32)
    with usage_errors():
        recipe = Recipe(batch_size=batch_size, **model)
        check_images(recipe, image_size)
    print(model_summary(recipe, image_size, len(data.CIFAR10_CLASSES), depth=3))
