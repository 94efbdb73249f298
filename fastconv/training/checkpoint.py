"""The file of a training run, from which it goes on exactly where it stopped."""

from __future__ import annotations

import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastconv.files import write_atomically

FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message is one line: what was got, what was expected, what to do."""


@dataclass
class Checkpoint:
    """What the file holds: the state of a run between two steps.

    Args:
        recipe: the arguments of `fastconv.training.Recipe`.
        classes: names; logit i is `classes[i]`.
        image_size: channels, height and width of the images trained on.
        train_images: how many images an epoch has.
        model: state_dict.
        optimizer: state_dict.
        rng: the states of PyTorch's generators, by device type.
        epoch: epochs whose training and validation are done.
        step: steps done of the epoch after that.
        losses: float32 [step], the loss of each of them.
        correct: how many of the images in those steps were classified correctly.
        history: the metrics of each epoch done.
        test: the metrics on the test set, once the last epoch is done.
        seconds: time spent so far.
    """

    recipe: dict[str, Any]
    classes: list[str]
    image_size: list[int]
    train_images: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    epoch: int
    step: int
    losses: Tensor
    correct: int
    history: list[dict[str, float]]
    test: dict[str, float] | None
    seconds: float

    def save(self, path: Path) -> None:
        """Write the checkpoint to `path`, which at any moment holds either the old one or the new."""
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **vars(self)}, file))

    def check_data(self, classes: list[str], image_size: list[int], train_images: int) -> None:
        """Raise CheckpointError if that is not the data trained on."""
        for what, trained_on, given in [
            ("classes", self.classes, classes),
            ("image size", self.image_size, image_size),
            ("number of training images", self.train_images, train_images),
        ]:
            if trained_on != given:
                raise CheckpointError(
                    f"the data has another {what} than the checkpoint: {given}, expected {trained_on}; "
                    "give the data that it was trained on"
                )

    def restore(self, model: nn.Module, optimizer: Optimizer | None, device: torch.device) -> None:
        """Load the state into a model, and into the optimizer and generators if the run goes on.

        Raises:
            CheckpointError: it does not fit.
        """
        try:
            model.load_state_dict(self.model)
            if optimizer is not None:
                optimizer.load_state_dict(self.optimizer)
                torch.set_rng_state(self.rng["cpu"])
                if device.type == "cuda" and "cuda" in self.rng:
                    torch.cuda.set_rng_state(self.rng["cuda"], device)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint's state does not fit its own recipe ({reason})") from error


def _types(hint: Any) -> tuple[type, ...]:
    """Return the classes of a type hint, without what their elements are."""
    return tuple(get_origin(part) or part for part in (get_args(hint) if isinstance(hint, UnionType) else [hint]))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: there is none, it is damaged, or another program or a newer fastconv wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give the checkpoint.pt of a training run")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums that torch.save writes.
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files make the readers of zip archives and pickles raise nearly anything.
    except Exception as error:
        reason = textwrap.shorten(str(error), 100)
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason}); train again") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} was not written by fastconv; give the checkpoint.pt of a training run")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}; this fastconv reads {FORMAT}: use the version that wrote it"
        )
    hints = get_type_hints(Checkpoint)
    if missing := hints.keys() - state.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; train again")
    if wrong := [name for name, hint in hints.items() if not isinstance(state[name], _types(hint))]:
        raise CheckpointError(f"{path} has no proper {', '.join(wrong)}; train again")
    found = Checkpoint(**{name: state[name] for name in hints})
    if found.losses.shape != (found.step,):
        raise CheckpointError(
            f"{path} has losses of shape {tuple(found.losses.shape)}, not of its {found.step} steps"
        )
    return found
