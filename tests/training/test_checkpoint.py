"""Checkpoints: written in one step, read without executing them, refused with a reason."""

import os
import pickle

import pytest
import torch

from fastconv.training import checkpoint
from fastconv.training.checkpoint import Checkpoint, CheckpointError


def example(**changes):
    state = {
        "recipe": {"epochs": 2},
        "classes": ["a", "b"],
        "image_size": [3, 8, 8],
        "train_images": 10,
        "model": {"weight": torch.arange(3.0)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "rng": {"cpu": torch.get_rng_state()},
        "epoch": 1,
        "step": 2,
        "losses": torch.tensor([0.5, 0.25]),
        "correct": 3,
        "history": [{"epoch": 1, "train_loss": 2.0}],
        "test": None,
        "seconds": 1.5,
    }
    return Checkpoint(**{**state, **changes})


def test_what_is_saved_is_loaded(tmp_path):
    saved = example()
    saved.save(tmp_path / "checkpoint.pt")
    loaded = checkpoint.load(tmp_path / "checkpoint.pt")
    for name in ("recipe", "classes", "image_size", "train_images", "optimizer", "epoch", "step", "correct"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.history == saved.history
    assert loaded.test is None
    assert torch.equal(loaded.model["weight"], saved.model["weight"])
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


class Trap:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "flipped":
        # A bit of a weight: the records have checksums.
        content = bytearray(path.read_bytes())
        content[content.index(torch.arange(3.0).numpy().tobytes())] ^= 1
        path.write_bytes(content)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Trap(f"touch {path.parent}/executed")))
    elif how == "executable":
        torch.save({"format": 1, "model": Trap(f"touch {path.parent}/executed")}, path)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "flipped", "pickle", "executable"])
def test_damaged_files_are_refused_and_not_executed(tmp_path, how):
    path = tmp_path / "checkpoint.pt"
    example().save(path)
    damage(path, how)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged or not a checkpoint") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "was not written by fastconv"),
        ({"state_dict": {}}, "was not written by fastconv"),
        ({"format": 99}, "has format 99; this fastconv reads 1"),
        ({"format": 1, "model": {}}, "lacks classes, correct, epoch"),
        ({"format": 1, **vars(example(epoch="2", losses=[]))}, "has no proper epoch, losses; train again"),
        (
            {"format": 1, **vars(example(step=3, losses=torch.ones(2)))},
            r"losses of shape \(2,\), not of its 3 steps",
        ),
    ],
    ids=["list", "other program", "newer", "incomplete", "wrong types", "wrong count"],
)
def test_foreign_checkpoints_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "checkpoint.pt")


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pt is not a file; give the checkpoint.pt"):
        checkpoint.load(tmp_path / "nothing.pt")
