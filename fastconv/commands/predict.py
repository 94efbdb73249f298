"""`fastconv predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastconv.commands.options import BackendOption, CheckpointOption, DeviceOption, JsonOption, choose
from fastconv.training import checkpoint, prediction
from fastconv.training.stepper import NonFinite


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(help="Image files of any size and mode.", metavar="IMAGE...", show_default=False),
    ],
    checkpoint_path: CheckpointOption,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Name the three most probable classes of images.

    An image is scaled and cropped in the middle to the size trained on. The layer norm spans the batch, so each
    image goes through the model by itself: what else is in the call does not change its answer.
    """
    state = checkpoint.load(checkpoint_path)
    place = choose(device, backend)
    model = prediction.load_model(state, place)
    # All are read before any is answered: a wrong name is found at once.
    inputs = [prediction.read_input(path, state.image_size) for path in images]
    for path, image in zip(images, inputs, strict=True):
        try:
            top = prediction.predict(model, image.to(place), min(3, len(state.classes)))
        except NonFinite as error:
            raise NonFinite(f"{path}: {error}") from error
        named = [(state.classes[label], probability) for label, probability in top]
        if json_output:
            classes = [{"class": name, "probability": probability} for name, probability in named]
            print(json.dumps({"image": str(path), "classes": classes}, allow_nan=False))
        else:
            print(f"{path}: {', '.join(f'{name} {100 * probability:.1f} %' for name, probability in named)}")
