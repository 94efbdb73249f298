"""`fastconv summary`."""

from __future__ import annotations

from typing import Annotated

import typer

from fastconv.commands.options import DEFAULTS, DepthOption, PatchOption, WidthOption, usage_errors
from fastconv.training import data
from fastconv.training.display import model_summary
from fastconv.training.recipe import Recipe, check_patch


def summary(
    width: WidthOption = DEFAULTS.width,
    depth: DepthOption = DEFAULTS.depth,
    patch: PatchOption = DEFAULTS.patch,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = DEFAULTS.batch_size,
) -> None:
    """Print the layers and parameters of the classifier, for CIFAR-10."""
    image_size = (3, 32, 32)
    with usage_errors():
        recipe = Recipe(width=width, depth=depth, patch=patch, batch_size=batch_size)
        check_patch(recipe, image_size)
    print(model_summary(recipe, image_size, len(data.CIFAR10_CLASSES), depth=3))
