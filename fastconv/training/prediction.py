"""The classes of single images, from a trained checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastconv.extras import import_extra
from fastconv.modules import Classifier
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.images import pixels_of, read_image
from fastconv.training.recipe import make_model
from fastconv.training.stepper import NonFinite

if TYPE_CHECKING:
    from PIL.Image import Image


def load_model(checkpoint: Checkpoint, device: torch.device) -> Classifier:
    """Return the trained classifier, in evaluation mode.

    Raises:
        CheckpointError: its state does not fit its recipe.
    """
    model = make_model(checkpoint.recipe, checkpoint.image_size, len(checkpoint.classes))
    checkpoint.restore_result(model)
    return model.to(device).eval()


def read_input(path: Path, image_size: list[int]) -> Tensor:
    """Read an image of any size and mode as float32 [1, 3, H, W] in [0, 1], as in training.

    It is scaled until it covers H x W, and cropped in the middle.

    Raises:
        DataError: it cannot be read.
    """
    _, height, width = image_size
    image: Image = import_extra("PIL.ImageOps").fit(
        read_image(path), (width, height), method=import_extra("PIL.Image").Resampling.BICUBIC
    )
    return pixels_of(image)[None].float() / 255


@torch.no_grad()
def predict(model: nn.Module, image: Tensor, top: int = 3) -> list[tuple[int, float]]:
    """Return the `top` most probable classes of one image, as (label, probability), best first.

    The image goes through the model by itself: the layer norm of the lecture's model spans the batch, so that with
    other images beside it the answer would depend on them. Its mean and variance are then those of the one image.

    Args:
        image: float32 [1, channels, height, width] in [0, 1], on the model's device.

    Raises:
        ValueError: there is not exactly one image.
        NonFinite: a probability is NaN.
    """
    if len(image) != 1:
        raise ValueError(f"got {len(image)} images; expected one: call predict for each")
    probabilities, labels = model(image).float().softmax(1)[0].topk(top)
    if not probabilities.isfinite().all():
        raise NonFinite("a probability is not finite; the weights are too large for this image")
    return list(zip(labels.tolist(), probabilities.tolist(), strict=True))
