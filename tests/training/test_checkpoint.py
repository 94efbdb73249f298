"""Checkpoints: written in one step, read without executing them, refused with a reason."""

import os
from dataclasses import replace

import pytest
import torch

from fastconv.training import checkpoint, loop
from fastconv.training.checkpoint import CheckpointError
from fastconv.training.data import Dataset, ImageSet
from fastconv.training.recipe import Recipe

CPU = torch.device("cpu")


def example(seconds=1.5):
    """The checkpoint of a run before its first step."""
    recipe = Recipe(epochs=2, batch_size=4, width=2, depth=1, patch=2)
    images = ImageSet(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10) % 2)
    dataset = Dataset(images, images, ("a", "b"), "made", "/some/where")
    return replace(loop.prepare(recipe, dataset, CPU, None).checkpoint(), seconds=seconds)


def test_what_is_saved_is_loaded(tmp_path):
    saved = example()
    saved.save(tmp_path / "checkpoint.pt")
    loaded = checkpoint.load(tmp_path / "checkpoint.pt")
    for name in saved.__dataclass_fields__.keys() - {"model", "losses", "rng"}:
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.model.keys() == saved.model.keys()
    assert all(torch.equal(loaded.model[name], weight) for name, weight in saved.model.items())
    assert torch.equal(loaded.losses, saved.losses)
    assert torch.equal(loaded.rng["cpu"], saved.rng["cpu"])
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_it_loads_with_weights_only(tmp_path):
    example().save(tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["format"] == checkpoint.FORMAT


@pytest.mark.parametrize("failing", ["torch.save", "os.replace"])
def test_a_failure_while_saving_leaves_the_old_one(tmp_path, monkeypatch, failing):
    path = tmp_path / "checkpoint.pt"
    example(seconds=1.0).save(path)

    def fail(*arguments):
        # What a full disk does: a part is written, then an error.
        if failing == "torch.save":
            arguments[1].write(b"part")
        raise OSError("no space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="no space left"):
        example(seconds=2.0).save(path)
    assert checkpoint.load(path).seconds == 1.0
    monkeypatch.undo()
    example(seconds=3.0).save(path)
    assert checkpoint.load(path).seconds == 3.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "was not written by fastconv; give the checkpoint.pt of a training run"),
        ({"state_dict": {}}, "was not written by fastconv"),
        ({"format": 1}, "has format 1; this fastconv reads 5: use the version that wrote it"),
        ({"format": 99}, "has format 99; this fastconv reads 5"),
        ({"format": 5, "model": {}}, "cannot be used: the checkpoint lacks averaged, classes, correct"),
    ],
    ids=["list", "other program", "older", "newer", "incomplete"],
)
def test_foreign_checkpoints_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": "2"}, "the checkpoint's epoch is '2'; expected an integer of at most 64 bits; train again"),
        ({"losses": []}, r"the checkpoint's losses is \[\]; expected a contiguous tensor on the CPU"),
        ({"step": 2}, "its losses cannot come from a run of its recipe"),
        ({"train_images": 10**18}, "its train_images cannot come from a run of its recipe"),
        ({"model": {}}, "its model lacks 'bottleneck.bias'"),
    ],
)
def test_the_part_that_is_wrong_is_named(tmp_path, change, message):
    replace(example(), **change).save(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "checkpoint.pt")
