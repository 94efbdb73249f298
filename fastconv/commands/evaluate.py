"""`fastconv evaluate`."""

from __future__ import annotations

import json

from fastconv.commands.options import (
    BackendOption,
    CheckpointOption,
    DataOption,
    DeviceOption,
    JsonOption,
    choose,
)
from fastconv.training import checkpoint, data, loop, prediction
from fastconv.training.recipe import Recipe


def evaluate(
    checkpoint_path: CheckpointOption,
    data_directory: DataOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Measure a checkpoint's loss and accuracy on its validation images and on the test images."""
    state = checkpoint.load(checkpoint_path)
    place = choose(device, backend)
    model = prediction.load_model(state, place)
    dataset, recipe = data.load(data_directory), Recipe(**state.recipe)
    sets = loop.make_sets(dataset, recipe, place)
    state.check_data(list(dataset.classes), list(dataset.train.images.shape[1:]), len(sets.train))
    results: dict[str, float] = {}
    for name, images in [("validation", sets.validation), ("test", sets.test)]:
        loss, accuracy = loop.evaluate(model, images, recipe)
        results |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        if not json_output:
            print(f"{name + ':':<12}loss {loss:.4f}, accuracy {100 * accuracy:.2f} %, {len(images):,} images")
    if json_output:
        print(json.dumps(results))
