"""The lecture's recipe: everything that decides what a run computes.

80 % of the training images in shuffled batches of 128, pixels scaled to [0, 1] and nothing else, AdamW with a
learning rate of 1e-3, cross-entropy, five epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

import torch

from fastconv.modules import Classifier
from fastconv.training import typed

Precision = Literal["fp32", "bf16"]
# In which the convolutions of each precision compute.
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
TrainMetrics = Literal["evaluated", "running"]
# What nobody trains: more asks for a mistake to be found, not for hours or terabytes.
LARGEST = {
    "epochs": 100_000,
    "batch_size": 1_000_000,
    "width": 10_000,
    "depth": 200,
    "patch": 1_000,
    "limit": 1_000_000_000,
    "seed": 2**32 - 1,
    "split_seed": 2**32 - 1,
}
# A step of AdamW changes each weight by about the learning rate, and initial weights are below 1.
LARGEST_LR = 1.0
LARGEST_SIDE = 4096


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
            value, least = getattr(self, name), 0 if name.endswith("seed") else 1
            if value is not None and not least <= value <= largest:
                raise ValueError(f"{name} is {value}; expected {least} to {largest:,}")
        if not 0 < self.lr <= LARGEST_LR:
            raise ValueError(f"lr is {self.lr}; expected a positive number, at most {LARGEST_LR:g}")
        # Each step multiplies the weights by one minus their product.
        if not 0 <= self.weight_decay <= 1 / self.lr:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; expected 0 to {1 / self.lr:g}, one divided by the lr"
            )


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


def shape_of_model(recipe: Recipe, image_size: Sequence[int], classes: int) -> Classifier:
    """Return the classifier on the meta device, where weights take no memory."""
    with torch.device("meta"):
        return Classifier(recipe.width, recipe.depth, recipe.patch, image_size[0], classes)


def make_model(recipe: Recipe, image_size: Sequence[int], classes: int) -> Classifier:
    """Return the classifier with the initial weights of the recipe's seed.

    Raises:
        ValueError: the images are too small for its patches, or huge.
    """
    check_images(recipe, image_size)
    torch.manual_seed(recipe.seed)
    return Classifier(recipe.width, recipe.depth, recipe.patch, image_size[0], classes)


def autocast(recipe: Recipe, device: torch.device, enabled: bool = True) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and recipe.precision == "bf16")
