"""The state of a training run: what is trained, how far it is, and its way into a checkpoint and back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fastconv.synchronization import set_process_group
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.data import Dataset
from fastconv.training.environment import Environment
from fastconv.training.graphed import Graph, graphed
from fastconv.training.ingredients import Ingredients
from fastconv.training.planned import planned
from fastconv.training.ranks import Ranks
from fastconv.training.recipe import Recipe, make_model, parameter_groups
from fastconv.training.schedule import has_schedule
from fastconv.training.sets import Batches, Sets, epoch_order
from fastconv.training.stepper import AutogradStepper, NonFinite, Stepper, loss_and_accuracy, mean_loss
from fastconv.training.whitening import whiten


class State:
    """A run between two steps; a new one is before its first.

    Args:
        sets: the images of the data set that the recipe takes.
        started: when the run began in this process, by `time.monotonic`.
        resumed: a checkpoint to go on from; without one a run begins.
        ranks: the processes of the run, all of which do what is done with its state.

    Raises:
        ValueError: the images are too small for the recipe's patches, or huge.
        CheckpointError: `resumed` does not fit the recipe or the data.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        sets: Sets,
        started: float,
        resumed: Checkpoint | None,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.dataset, self.sets, self.ranks = recipe, dataset, sets, ranks
        self.device = sets.images.images.device
        self.image_size = list(dataset.train.images.shape[1:])
        if resumed is not None:
            resumed.check_data(dataset, len(sets.train))
        self.data_checksum = dataset.checksum if resumed is None else resumed.data_checksum
        self.environment = Environment.now(self.device, ranks.count)
        self.model = make_model(recipe, self.image_size, len(dataset.classes))
        if recipe.whiten and resumed is None:
            whiten(self.model.stem, sets.images.images[sets.train.start : sets.train.stop])
        self.model.to(self.device)
        set_process_group(self.model, ranks.group)
        self.optimizer = make_optimizer(self.model, recipe)
        self.steps = math.ceil(len(sets.train) / recipe.batch_size)
        self.ingredients = Ingredients(
            recipe, self.model, self.optimizer, len(sets.train), self.steps, self.device
        )
        # Epochs done, then steps done of the next one.
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, float]] = []
        self.test: dict[str, float] | None = None
        self.started = started
        # The time of evaluations that are over, and when the one that goes on began.
        self._evaluated = 0.0
        self._evaluating: float | None = None
        if resumed is not None:
            resumed.restore(self.model, self.optimizer, self.ingredients.averaged, self.device)
            self.epoch, self.step, self.history = resumed.epoch, resumed.step, list(resumed.history)
            self.started -= resumed.seconds
            self._evaluated = resumed.evaluation_seconds
        batches = Batches(sets.images, recipe.batch_size, ranks)
        self._autograd = AutogradStepper(self.model, self.optimizer, recipe, batches, self.ingredients)
        self.stepper: Stepper = self._autograd
        if resumed is not None:
            self.stepper.trained.go_on(resumed.losses, resumed.correct)

    def choose_steps(self, graph: Graph, note: Callable[[str], None]) -> None:
        """Take the fastest way to do steps that runs here.

        Args:
            note: called with one line for each way that should have been there and is not.
        """
        size = min(self.recipe.batch_size, len(self.sets.train))
        self.stepper = graphed(planned(self._autograd, size, note), graph, note)

    @property
    def losses(self) -> Tensor:
        """float32 [steps], the loss of each step of the epoch so far; to read it makes the host wait."""
        return self.stepper.trained.losses[: self.steps]

    @property
    def seconds(self) -> float:
        """The time spent so far, in all processes of the run."""
        return time.monotonic() - self.started

    @property
    def evaluation_seconds(self) -> float:
        """The part of it that evaluations took, the one that goes on included."""
        return self._evaluated + (0.0 if self._evaluating is None else time.monotonic() - self._evaluating)

    def save(self, path: Path) -> Checkpoint:
        """Write a checkpoint to `path`, in the first process, and return it.

        Raises:
            NonFinite: nothing was written.
            WriteError: it cannot be written.
        """
        checkpoint = self.checkpoint()
        if self.ranks.is_first:
            checkpoint.save(path)
        return checkpoint

    def checkpoint(self) -> Checkpoint:
        """Return what to go on from.

        Raises:
            NonFinite: the state is of no use.
        """
        self.gather()
        self.check_finite()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            recipe=self.recipe,
            classes=list(self.dataset.classes),
            image_size=self.image_size,
            train_images=len(self.sets.train),
            data_directory=self.dataset.directory,
            data_checksum=self.data_checksum,
            environment=self.environment,
            model=self.model.state_dict(),
            averaged=None if self.ingredients.averaged is None else self.ingredients.averaged.state_dict(),
            # A plan keeps its zeros there before the first step already.
            optimizer=self.optimizer.state_dict()["state"] if self.epoch + self.step > 0 else {},
            rng=rng,
            epoch=self.epoch,
            step=self.step,
            losses=self.losses[: self.step].clone(),
            correct=int(self.stepper.trained.correct),
            history=self.history,
            test=self.test,
            seconds=self.seconds,
            evaluation_seconds=self.evaluation_seconds,
        )

    def gather(self) -> None:
        """Make the losses and correct answers so far those of all processes."""
        self.stepper.trained.gather(self.ranks, self.step)

    def check_finite(self) -> None:
        """Raise NonFinite, which names the step of the epoch, if a loss or a weight is not finite."""
        wrong = (~self.losses[: self.step].isfinite()).nonzero()
        if len(wrong) > 0:
            step = int(wrong[0])
            raise NonFinite(f"the loss is {self.losses[step].item()} in epoch {self.epoch + 1}, step {step + 1}")
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            raise NonFinite(f"a weight is not finite in epoch {self.epoch + 1}, after step {self.step}")

    def rest_of_epoch(self) -> list[int]:
        """Go to the next of the epoch's batches; return how many images each of those to come has."""
        self.ingredients.start(self.epoch)
        order = self.sets.train.start + epoch_order(len(self.sets.train), self.recipe.seed, self.epoch)
        return self.stepper.batches.start(order, self.step * self.recipe.batch_size)

    def train(self, size: int) -> None:
        """Do one step of the optimizer, on the next images."""
        self.stepper.train(size)
        self.step += 1

    def evaluate(self, images: range, advanced: Callable[[int], None]) -> tuple[float, float]:
        """As `loss_and_accuracy`; its time counts as evaluation's."""
        self._evaluating = time.monotonic()
        found = loss_and_accuracy(self.stepper, images, advanced)
        self._evaluated, self._evaluating = self.evaluation_seconds, None
        return found

    def running_metrics(self) -> tuple[float, float]:
        """Return loss and accuracy over the epoch's images, each as it was when its step began."""
        self.gather()
        images, tally = len(self.sets.train), self.stepper.trained
        return mean_loss(self.losses, images, self.recipe.batch_size), tally.correct.item() / images

    def end_epoch(self, train: tuple[float, float], validation: tuple[float, float]) -> None:
        """Add the epoch's metrics to the history, and stand before the next one's first step.

        Args:
            train, validation: loss and accuracy.
        """
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "train_loss": train[0],
                "train_accuracy": train[1],
                "validation_loss": validation[0],
                "validation_accuracy": validation[1],
                "seconds": self.seconds,
                "evaluation_seconds": self.evaluation_seconds,
            }
        )
        self.epoch, self.step = self.epoch + 1, 0
        self.stepper.trained.clear()


def make_optimizer(model: nn.Module, recipe: Recipe) -> AdamW:
    """Return the recipe's optimizer.

    A fused step is one pass over a parameter instead of ten, on a CPU four times as fast.
    """
    device = next(model.parameters()).device
    return AdamW(
        parameter_groups(model, recipe),
        # A schedule changes it where it lies, also in a CUDA graph.
        lr=torch.tensor(recipe.lr, device=device) if has_schedule(recipe) else recipe.lr,
        weight_decay=recipe.weight_decay,
        fused=device.type in ("cpu", "cuda"),
        # What may be captured as a CUDA graph counts steps on the device.
        capturable=device.type == "cuda",
    )
