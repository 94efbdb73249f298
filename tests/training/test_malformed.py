"""Whatever a checkpoint's file holds: one line that names it, exit code 2, and nothing executed or written."""

import errno
import functools
import os
import time
import zipfile

import malformed
import pytest
import torch
import typer.main

from fastconv.training import loop
from fastconv.training.data import Dataset, ImageSet
from fastconv.training.recipe import Recipe

CASES = malformed.cases()
COMMANDS = ("evaluate", "predict", "train")
# Typer builds its commands anew in each call, which takes longer than the call.
built_once = functools.cache(typer.main.get_command)


@pytest.fixture(autouse=True)
def _commands_are_built_once(monkeypatch):
    monkeypatch.setattr(typer.main, "get_command", built_once)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint in the middle of the second of two epochs, and its content."""
    generator = torch.Generator().manual_seed(0)

    def images(count):
        pixels = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.arange(count) % 3)

    recipe = Recipe(epochs=2, batch_size=16, width=4, depth=1, patch=2, ema=0.5)
    dataset = Dataset(images(100), images(10), ("a", "b", "c"), "made", "/nowhere")
    state = loop.prepare(recipe, dataset, torch.device("cpu"), None)
    for size in state.rest_of_epoch():
        state.train(size)
    state.end_epoch(state.running_metrics(), state.evaluate(state.sets.validation, lambda done: None))
    for size in state.rest_of_epoch()[:2]:
        state.train(size)
    path = tmp_path_factory.mktemp("good") / "checkpoint.pt"
    state.save(path)
    return path


def use(run, command, path):
    if command == "train":
        return run("train", "--resume", "--out", path.parent)
    return run(command, "--checkpoint", path, *(["no.png"] if command == "predict" else []))


def seen(folder):
    return {p.name: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.iterdir()}


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_checkpoint_is_refused(run, good, tmp_path, name):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(good.read_bytes())
    CASES[name](path, malformed.content_of(good))
    before, started = seen(tmp_path), time.monotonic()
    code, out, err = use(run, COMMANDS[list(CASES).index(name) % 3], path)
    assert (code, out) == (2, "")
    assert err.startswith(f"fastconv: {path}"), err
    assert err.count("\n") == 1
    assert len(err) < 500
    assert seen(tmp_path) == before
    # No size that a file claims is believed.
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("command", COMMANDS)
def test_the_good_one_is_refused_only_for_its_data_or_image(run, good, tmp_path, command):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(good.read_bytes())
    code, _, err = use(run, command, path)
    assert code == 2
    assert ("no.png" if command == "predict" else "/nowhere is not a directory") in err


def test_there_are_many():
    assert len(CASES) >= 150


@pytest.mark.parametrize("failing", ["open", "is_file", "load"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(run, good, tmp_path, monkeypatch, failing):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(good.read_bytes())

    def fail(*_, **__):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    owner = {"open": zipfile.ZipFile, "is_file": type(path), "load": torch}[failing]
    monkeypatch.setattr(owner, "testzip" if failing == "open" else failing, fail)
    _, _, err = use(run, "evaluate", path)
    assert err == f"fastconv: {path} cannot be read: Permission denied; check the file\n"
