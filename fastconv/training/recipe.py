"""Recipes: everything that decides what a run computes.

The lecture's takes 80 % of the training images in shuffled batches of 128, pixels scaled to [0, 1] and nothing
else, AdamW with a learning rate of 1e-3, cross-entropy, five epochs. The modern one adds what makes a model
generalise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import torch
from torch import nn

from fastconv.modules import Classifier
from fastconv.training import typed

Precision = Literal["fp32", "bf16"]
# In which the convolutions of each precision compute.
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
TrainMetrics = Literal["evaluated", "running"]
Norm = Literal["tensor", "sample", "channel"]
Schedule = Literal["constant", "linear"]
Decay = Literal["all", "weights"]
LARGEST_SIDE = 4096
# What nobody trains: more asks for a mistake to be found, not for hours or terabytes.
LARGEST = {
    "epochs": 100_000,
    "batch_size": 1_000_000,
    "width": 10_000,
    "depth": 200,
    "patch": 1_000,
    "limit": 1_000_000_000,
    "crop": LARGEST_SIDE,
    "cutout": LARGEST_SIDE,
    "seed": 2**32 - 1,
    "split_seed": 2**32 - 1,
}
# Whitening finds the eigenvectors of a matrix with a row for each number of a patch: at most 3,072.
LARGEST_WHITENED_PATCH = 32
# A step of AdamW changes each weight by about the learning rate, and initial weights are below 1.
LARGEST_LR = 1.0


@dataclass(frozen=True)
class Recipe:
    """The defaults are the lecture's; `fastconv train` has an option for each field, with its description.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: Annotated[int, "Passes over the training images."] = 5
    batch_size: Annotated[int, "Images per step, and in evaluation: the layer norm spans the batch."] = 128
    lr: Annotated[float, "AdamW's learning rate."] = 1e-3
    weight_decay: Annotated[float, "AdamW's weight decay."] = 0.01
    width: Annotated[int, "Channels of the first stage."] = 32
    depth: Annotated[int, "Blocks in each of the two stages."] = 5
    patch: Annotated[int, "Side of the stem's patches, pixels."] = 4
    seed: Annotated[int, "Decides the initial weights and the order of images."] = 0
    split_seed: Annotated[int, "Decides the split into training and validation images."] = 55
    precision: Annotated[Precision, "bf16 uses torch.autocast."] = "fp32"
    norm: Annotated[
        Norm,
        "What each layer norm is computed over: tensor, the whole batch, so that an image's answer depends on the "
        "images beside it; sample, one image; channel, one pixel.",
    ] = "tensor"
    whiten: Annotated[bool, "Begin with a stem that whitens the patches of the training images."] = False
    crop: Annotated[int, "Crop training images at random out of a black frame of so many pixels."] = 0
    flip: Annotated[bool, "Mirror training images at random."] = False
    cutout: Annotated[int, "Blacken a square of so many pixels a side at a random place of training images."] = 0
    label_smoothing: Annotated[float, "Share of each label that is spread over all classes."] = 0.0
    schedule: Annotated[Schedule, "Keep the learning rate, or let it fall to zero in a line."] = "constant"
    warmup: Annotated[float, "Share of all steps in which the learning rate first rises from zero."] = 0.0
    decay: Annotated[Decay, "What weight decay shrinks: all parameters, or weights only, not biases."] = "all"
    ema: Annotated[
        float,
        "Evaluate and keep an exponential moving average of the weights, of which each step keeps so much.",
    ] = 0.0
    train_metrics: Annotated[
        TrainMetrics,
        "What an epoch reports of the training images: evaluated, loss and accuracy of its final weights, as in "
        "the lecture; or running, means over the steps, which take no time.",
    ] = "evaluated"
    limit: Annotated[
        int | None, "For a quick try: use only so many training, validation and test images, drawn at random."
    ] = None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Recipe).items():
            typed.build(hint, getattr(self, name), name)
        for name, largest in LARGEST.items():
            value, least = getattr(self, name), 0 if name in ("crop", "cutout", "seed", "split_seed") else 1
            if value is not None and not least <= value <= largest:
                raise ValueError(f"{name} is {value}; expected {least} to {largest:,}")
        if not 0 < self.lr <= LARGEST_LR:
            raise ValueError(f"lr is {self.lr}; expected a positive number, at most {LARGEST_LR:g}")
        # Each step multiplies the weights by one minus their product.
        if not 0 <= self.weight_decay <= 1 / self.lr:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; expected 0 to {1 / self.lr:g}, one divided by the lr"
            )
        if self.whiten and self.patch > LARGEST_WHITENED_PATCH:
            raise ValueError(
                f"patch is {self.patch}, too large for whiten; expected at most {LARGEST_WHITENED_PATCH}"
            )
        for name in ("label_smoothing", "warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0 and less than 1")


# What changes a training step; each is off in the lecture's.
INGREDIENTS = ("norm", "crop", "flip", "cutout", "label_smoothing", "schedule", "warmup", "decay", "ema")
# By the names that `fastconv train --recipe` takes.
RECIPES = {
    "lecture": Recipe(),
    "modern": Recipe(
        batch_size=64,
        lr=4e-3,
        weight_decay=0.05,
        norm="sample",
        whiten=True,
        crop=4,
        flip=True,
        label_smoothing=0.1,
        schedule="linear",
        warmup=0.15,
        decay="weights",
    ),
}


def check_images(recipe: Recipe, image_size: Sequence[int]) -> None:
    """Raise ValueError if images (channels, height, width) are too small for the classifier's patches, or huge."""
    _, height, width = image_size
    if not 2 <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
        raise ValueError(f"images of {height} x {width} pixels; expected 2 to {LARGEST_SIDE:,} on each side")
    if min(height, width) < 2 * recipe.patch:
        raise ValueError(
            f"patch is {recipe.patch}, for images of {height} x {width} pixels; "
            f"expected at most {min(height, width) // 2}"
        )
    for name in ("crop", "cutout"):
        if getattr(recipe, name) > min(height, width):
            raise ValueError(
                f"{name} is {getattr(recipe, name)}, for images of {height} x {width} pixels; "
                f"expected at most {min(height, width)}"
            )


def shape_of_model(recipe: Recipe, image_size: Sequence[int], classes: int) -> Classifier:
    """Return the classifier on the meta device, where weights take no memory."""
    with torch.device("meta"):
        return Classifier(recipe.width, recipe.depth, recipe.patch, image_size[0], classes, recipe.norm)


def make_model(recipe: Recipe, image_size: Sequence[int], classes: int) -> Classifier:
    """Return the classifier with the initial weights of the recipe's seed.

    Raises:
        ValueError: the images are too small for its patches, or huge.
    """
    check_images(recipe, image_size)
    torch.manual_seed(recipe.seed)
    return Classifier(recipe.width, recipe.depth, recipe.patch, image_size[0], classes, recipe.norm)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return what weight decay shrinks, and what it does not, as groups for an optimizer."""
    parameters = list(model.parameters())
    if recipe.decay == "all":
        return [{"params": parameters}]
    # A bias is a vector.
    weights, biases = [[p for p in parameters if (p.dim() > 1) is is_weight] for is_weight in (True, False)]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0}]


def autocast(recipe: Recipe, device: torch.device, enabled: bool = True) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and recipe.precision == "bf16")
