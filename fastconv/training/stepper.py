"""The steps of a training and of its evaluations: all that they read and write stays in place on the device.

The host only starts a step, and knows no more than how many images it takes. So the very code that runs step by
step can be captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fastconv.training.ingredients import Ingredients
from fastconv.training.ranks import Ranks
from fastconv.training.recipe import Recipe, autocast
from fastconv.training.sets import Batches


class NonFinite(RuntimeError):
    """A loss, a weight or a probability became infinite or NaN. The message is one line that says which."""


class Tally:
    """What the steps of an epoch, or of an evaluation, came to; only to read it makes the host wait.

    Of several processes, each enters what its part of a batch adds to these, until `gather` sums them up.

    Attributes:
        losses: float32 [steps], the mean loss of each step's images.
        correct: int64 [1], how many images were classified correctly.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.losses = torch.zeros(steps, device=device)
        self.correct = torch.zeros(1, dtype=torch.int64, device=device)
        # The first steps, and the correct answers in them, that are those of all processes.
        self._gathered, self._known = 0, torch.zeros_like(self.correct)

    def clear(self) -> None:
        self.go_on(self.losses[:0], 0)

    def go_on(self, losses: Tensor, correct: int) -> None:
        """Begin after these steps, of all processes."""
        self._gathered = len(losses)
        self.losses.zero_()[: len(losses)] = losses
        self.correct.fill_(correct)
        self._known.copy_(self.correct)

    def gather(self, ranks: Ranks, steps: int) -> None:
        """Make what was entered for the first `steps` steps that of all processes."""
        if ranks.count == 1 or steps == self._gathered:
            return
        ranks.sum(self.losses[self._gathered : steps])
        self._known += ranks.sum(self.correct - self._known)
        self.correct.copy_(self._known)
        self._gathered = steps


class Stepper(Protocol):
    """Takes the next images of `batches`, and enters what came of them into a tally."""

    batches: Batches
    trained: Tally
    evaluated: Tally

    def train(self, size: int) -> None:
        """Do one step of the optimizer."""

    def evaluate(self, size: int) -> None:
        """Only classify."""


class AutogradStepper:
    """Steps by PyTorch's autograd and an optimizer of torch.optim.

    Args:
        optimizer: of the model's parameters; None for evaluations only.
        ingredients: what the recipe adds to the lecture's training steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        recipe: Recipe,
        batches: Batches,
        ingredients: Ingredients | None = None,
    ) -> None:
        self.model, self.optimizer, self.recipe, self.batches = model, optimizer, recipe, batches
        self.ingredients = ingredients
        device = batches.position.device
        self._trained_model = model
        if optimizer is not None:
            self._trained_model = batches.ranks.parallel(model, batches.example())
        steps = math.ceil(len(batches.images) / recipe.batch_size)
        self.trained, self.evaluated = Tally(steps, device), Tally(steps, device)

    def train(self, size: int) -> None:
        assert self.optimizer is not None
        step, ranks = self._step(), self.batches.ranks
        augment = None if self.ingredients is None else self.ingredients.augment
        images, labels = self.batches.next(size, augment)
        smoothing = self.recipe.label_smoothing
        loss = self._classify(self._trained_model, images, labels, step, self.trained, size, smoothing)
        self.optimizer.zero_grad()
        # Here, not in autograd's thread for a GPU, where the host is slower: bench/NOTES.md.
        with torch.autograd.set_multithreading_enabled(False):
            # The mean of the gradients of all processes is to be that of the whole batch's loss.
            (loss if ranks.count == 1 else loss * ranks.count).backward()
        if self.ingredients is not None:
            self.ingredients.set_rate(step)
        self.optimizer.step()
        if self.ingredients is not None:
            self.ingredients.average()

    @torch.no_grad()
    def evaluate(self, size: int) -> None:
        averaged = None if self.ingredients is None else self.ingredients.averaged
        step = self._step()
        self._classify(averaged or self.model, *self.batches.next(size), step, self.evaluated, size)

    def _step(self) -> Tensor:
        """The number of the step that comes next, int64 [1]."""
        return self.batches.position // self.batches.batch_size

    def _classify(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        step: Tensor,
        tally: Tally,
        size: int,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The loss: what this process's images add to the mean over all `size` of the batch."""
        with autocast(self.recipe, images.device):
            logits = model(images)
        if self.batches.ranks.count == 1:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        else:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="sum") / size
        tally.losses.index_copy_(0, step, loss.detach()[None])
        tally.correct += (logits.argmax(1) == labels).sum()
        return loss


def loss_and_accuracy(
    stepper: Stepper, images: range, advanced: Callable[[int], None] = lambda count: None
) -> tuple[float, float]:
    """Return the mean loss, and the accuracy in [0, 1], over some of the stepper's images.

    Args:
        advanced: called after each batch with the number of images done; the device may be behind.

    Raises:
        NonFinite: the loss is infinite or NaN.
    """
    count, batch_size = len(images), stepper.batches.batch_size
    stepper.evaluated.clear()
    done = 0
    for size in stepper.batches.start(torch.arange(images.start, images.stop)):
        stepper.evaluate(size)
        done += size
        advanced(done)
    steps = math.ceil(count / batch_size)
    stepper.evaluated.gather(stepper.batches.ranks, steps)
    mean = mean_loss(stepper.evaluated.losses[:steps], count, batch_size)
    if not math.isfinite(mean):
        raise NonFinite(f"the loss of {count:,} images in evaluation is {mean}")
    return mean, stepper.evaluated.correct.item() / count


def mean_loss(losses: Tensor, images: int, batch_size: int) -> float:
    """Return the mean over images of the losses of steps, each the mean over its batch."""
    sizes = torch.full_like(losses, batch_size, dtype=torch.float64, device="cpu")
    sizes[-1] = images - batch_size * (len(losses) - 1)
    return (losses.cpu().double() * sizes).sum().item() / images
