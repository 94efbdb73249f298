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
    load_data,
)
from fastconv.training import checkpoint, prediction
from fastconv.training.sets import Batches, make_sets
from fastconv.training.stepper import AutogradStepper, loss_and_accuracy


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
    dataset = load_data(data_directory, state)
    sets = make_sets(dataset, state.recipe, place)
    state.check_data(dataset, len(sets.train))
    batches = Batches(sets.images, state.recipe.batch_size)
    stepper = AutogradStepper(model, None, state.recipe, batches)
    results: dict[str, float] = {}
    for name, images in [("validation", sets.validation), ("test", sets.test)]:
        loss, accuracy = loss_and_accuracy(stepper, images)
        results |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        if not json_output:
            print(f"{name + ':':<12}loss {loss:.4f}, accuracy {100 * accuracy:.2f} %, {len(images):,} images")
    if json_output:
        print(json.dumps(results, allow_nan=False))
