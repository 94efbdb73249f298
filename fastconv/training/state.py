"""The state of a training run: what is trained, how far it is, and its way into a checkpoint and back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.training.checkpoint import Checkpoint
from fastconv.training.data import Dataset, ImageSet
from fastconv.training.environment import Environment
from fastconv.training.recipe import Recipe, autocast, epoch_order, make_model


class NonFinite(RuntimeError):
    """A loss, a weight or a probability became infinite or NaN. The message is one line that says which."""


class State:
    """A run between two steps; a new one is before its first.

    Args:
        train_images: how many images of the data set an epoch has.
        resumed: a checkpoint to go on from; without one a run begins.

    Raises:
        ValueError: the images are too small for the recipe's patches, or huge.
        CheckpointError: `resumed` does not fit the recipe or the data.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        train_images: int,
        device: torch.device,
        resumed: Checkpoint | None,
    ) -> None:
        self.recipe, self.dataset, self.train_images = recipe, dataset, train_images
        self.device = device
        self.image_size = list(dataset.train.images.shape[1:])
        if resumed is not None:
            resumed.check_data(dataset, train_images)
        self.data_checksum = dataset.checksum() if resumed is None else resumed.data_checksum
        self.environment = Environment.now(device)
        self.model = make_model(recipe, self.image_size, len(dataset.classes)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.steps = math.ceil(train_images / recipe.batch_size)
        # Epochs done, then steps done of the next one. Losses stay on the device: to read one makes the host wait.
        self.epoch, self.step = 0, 0
        self.losses = torch.zeros(self.steps, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.history: list[dict[str, float]] = []
        self.test: dict[str, float] | None = None
        self.started = time.monotonic()
        if resumed is not None:
            self._restore(resumed)

    @property
    def seconds(self) -> float:
        """The time spent so far, in all processes of the run."""
        return time.monotonic() - self.started

    def _restore(self, resumed: Checkpoint) -> None:
        resumed.restore(self.model, self.optimizer, self.device)
        self.epoch, self.step, self.history = resumed.epoch, resumed.step, list(resumed.history)
        self.losses[: self.step] = resumed.losses
        self.correct += resumed.correct
        self.started = time.monotonic() - resumed.seconds

    def save(self, path: Path) -> Checkpoint:
        """Write a checkpoint to `path`, and return it.

        Raises:
            NonFinite: nothing was written.
            WriteError: it cannot be written.
        """
        checkpoint = self.checkpoint()
        checkpoint.save(path)
        return checkpoint

    def checkpoint(self) -> Checkpoint:
        """Return what to go on from.

        Raises:
            NonFinite: the state is of no use.
        """
        self.check_finite()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            recipe=self.recipe,
            classes=list(self.dataset.classes),
            image_size=self.image_size,
            train_images=self.train_images,
            data_directory=self.dataset.directory,
            data_checksum=self.data_checksum,
            environment=self.environment,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict()["state"],
            rng=rng,
            epoch=self.epoch,
            step=self.step,
            losses=self.losses[: self.step].clone(),
            correct=int(self.correct),
            history=self.history,
            test=self.test,
            seconds=self.seconds,
        )

    def check_finite(self) -> None:
        """Raise NonFinite, which names the step of the epoch, if a loss or a weight is not finite."""
        wrong = (~self.losses[: self.step].isfinite()).nonzero()
        if len(wrong) > 0:
            step = int(wrong[0])
            raise NonFinite(f"the loss is {self.losses[step].item()} in epoch {self.epoch + 1}, step {step + 1}")
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise NonFinite(f"a weight is not finite in epoch {self.epoch + 1}, after step {self.step}")

    def rest_of_epoch(self, images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of the epoch that are still to be trained on."""
        order = epoch_order(len(images), self.recipe.seed, self.epoch).to(self.device)
        batch_size = self.recipe.batch_size
        return images.batches(batch_size, order[self.step * batch_size :])

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        """Do one step of the optimizer."""
        with autocast(self.recipe, self.device):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        # Here, not in autograd's thread for a GPU, where the host is slower: bench/NOTES.md.
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        self.optimizer.step()
        self.losses[self.step] = loss.detach()
        self.correct += (logits.argmax(1) == labels).sum()
        self.step += 1

    def end_epoch(self, validation_loss: float, validation_accuracy: float) -> None:
        """Add the epoch's metrics to the history, and stand before the next one's first step."""
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "train_loss": mean_loss(self.losses, self.train_images, self.recipe.batch_size),
                "train_accuracy": self.correct.item() / self.train_images,
                "validation_loss": validation_loss,
                "validation_accuracy": validation_accuracy,
                "seconds": self.seconds,
            }
        )
        self.epoch, self.step = self.epoch + 1, 0
        self.correct.zero_()


def mean_loss(losses: Tensor, images: int, batch_size: int) -> float:
    """Return the mean over images of the losses of an epoch's steps, each the mean over its batch."""
    sizes = torch.full_like(losses, batch_size, dtype=torch.float64, device="cpu")
    sizes[-1] = images - batch_size * (len(losses) - 1)
    return (losses.cpu().double() * sizes).sum().item() / images
