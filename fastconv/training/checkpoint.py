"""The file of a training run, from which it goes on exactly where it stopped."""

from __future__ import annotations

import reprlib
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastconv.files import write_atomically
from fastconv.training import consistency, typed
from fastconv.training.data import Dataset
from fastconv.training.environment import Environment
from fastconv.training.recipe import Recipe

FORMAT = 5


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message is one line: what was got, what was expected, what to do."""


@dataclass
class Checkpoint:
    """What the file holds: the state of a run between two steps.

    Args:
        classes: names; logit i is `classes[i]`.
        image_size: channels, height and width of the images trained on.
        train_images: how many images an epoch has.
        data_directory: the folder of the data set, as an absolute path; None for the downloaded CIFAR-10.
        data_checksum: of the whole data set, by `Dataset.checksum`.
        environment: of the process that wrote the file.
        model: state_dict.
        averaged: state_dict of the averaged weights, to evaluate and predict with, if the recipe has an `ema`.
        optimizer: the state of AdamW for each parameter; its options are in the recipe.
        rng: the states of PyTorch's generators, by device type.
        epoch: epochs whose training and validation are done.
        step: steps done of the epoch after that.
        losses: float32 [step], the loss of each of them.
        correct: how many of the images in those steps were classified correctly.
        history: the metrics of each epoch done.
        test: the metrics on the test set, once the last epoch is done.
        seconds: time spent so far.
        evaluation_seconds: the part of it that evaluations took.
    """

    recipe: Recipe
    classes: list[str]
    image_size: list[int]
    train_images: int
    data_directory: str | None
    data_checksum: str
    environment: Environment
    model: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    optimizer: dict[int, dict[str, Tensor]]
    rng: dict[str, Tensor]
    epoch: int
    step: int
    losses: Tensor
    correct: int
    history: list[dict[str, float]]
    test: dict[str, float] | None
    seconds: float
    evaluation_seconds: float

    def save(self, path: Path) -> None:
        """Write the checkpoint to `path`, which at any moment holds either the old one or the new.

        Raises:
            WriteError: it cannot be written.
        """
        # asdict would copy the tensors.
        content = vars(self) | {"recipe": asdict(self.recipe), "environment": asdict(self.environment)}
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))

    def check_data(self, dataset: Dataset, train_images: int) -> None:
        """Raise CheckpointError if that is not the data trained on, `train_images` of which are in an epoch."""
        for what, trained_on, given in [
            ("classes", self.classes, list(dataset.classes)),
            ("image size", self.image_size, list(dataset.train.images.shape[1:])),
            ("number of training images", self.train_images, train_images),
            ("checksum of pixels and labels", self.data_checksum, dataset.checksum),
        ]:
            if trained_on != given:
                place = self.data_directory or "the downloaded CIFAR-10"
                raise CheckpointError(
                    f"the data has another {what} than the checkpoint: {given}, expected {trained_on}; "
                    f"give with --data what it was trained on, then in {place}"
                )

    def restore(
        self, model: nn.Module, optimizer: Optimizer, averaged: nn.Module | None, device: torch.device
    ) -> None:
        """Load the state of a run that goes on, generators included.

        Args:
            averaged: the model of the averaged weights, if the recipe has an `ema`.

        Raises:
            CheckpointError: it does not fit.
        """
        with _fitting():
            model.load_state_dict(self.model)
            if averaged is not None:
                averaged.load_state_dict(self.averaged or {})
            options = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self.optimizer, "param_groups": options})
            torch.set_rng_state(self.rng["cpu"])
            if device.type == "cuda" and "cuda" in self.rng:
                torch.cuda.set_rng_state(self.rng["cuda"], device)

    def restore_result(self, model: nn.Module) -> None:
        """Load the weights to evaluate and predict with: the averaged ones, if there are any.

        Raises:
            CheckpointError: they do not fit.
        """
        with _fitting():
            model.load_state_dict(self.model if self.averaged is None else self.averaged)


@contextmanager
def _fitting() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint's state does not fit its own recipe ({reason})") from error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: there is none, it cannot be read, it is damaged, another program or another version of
            fastconv wrote it, or its parts do not fit together or are not finite.
    """
    state = read(path)
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} was not written by fastconv; give the checkpoint.pt of a training run")
    try:
        if type(state["format"]) is not int or state["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {reprlib.repr(state['format'])}; this fastconv reads {FORMAT}: "
                "use the version that wrote it"
            )
        fields = {name: value for name, value in state.items() if name != "format"}
        found: Checkpoint = typed.build(Checkpoint, fields, "the checkpoint")
        consistency.check(found)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}; train again") from error
    return found


def read(path: Path) -> Any:
    """Return the content of a file that torch.save wrote, of tensors, numbers, text and containers only.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        # Opening a pipe would wait for a writer.
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file; give the checkpoint.pt of a training run")
        with open(path, "rb") as file, warnings.catch_warnings():
            # PyTorch warns of what a file claims to be; the user gets one line.
            warnings.simplefilter("ignore")
            check_archive(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; check the file") from error
    # Damaged files make the readers of zip archives and pickles raise nearly anything.
    except Exception as error:
        reason = textwrap.shorten(str(error), 100)
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason}); train again") from error


def check_archive(file: Any) -> None:
    """Raise BadZipFile if an archive is damaged, or larger in memory than as a file."""
    with zipfile.ZipFile(file) as archive:
        size = file.seek(0, 2)
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise zipfile.BadZipFile("it is compressed, which fastconv's are not")
        # torch.load does not look at the checksums that torch.save writes.
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
