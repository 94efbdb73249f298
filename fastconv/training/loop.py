"""The lecture's training recipe on data that lives on the device, and a loop that can stop and go on exactly.

The recipe: 80 % of the training images in shuffled batches of 128, pixels scaled to [0, 1] and nothing else, AdamW
with a learning rate of 1e-3, cross-entropy, five epochs.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconv.machine import keep_freed_memory
from fastconv.modules import Classifier
from fastconv.training.checkpoint import Checkpoint, CheckpointError
from fastconv.training.data import DataError, Dataset, ImageSet, split_indices

PRECISIONS = ("fp32", "bf16")
# Between these, an epoch's losses stay on the device: reading one makes the host wait for it.
REPORT_SECONDS = 0.2
SAVE_SECONDS = 30.0
# Their product, and the first divided by 1e-3, are scalars in AdamW that must not overflow float32.
LARGEST_LR = 1e30
LARGEST_WEIGHT_DECAY = 1e6


class NonFiniteLoss(RuntimeError):
    """The loss, or a weight, became infinite or NaN."""


class Interrupted(Exception):
    """Ctrl-C: the run has been saved and can be resumed."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes; the defaults are the lecture's.

    Args:
        epochs: passes over the training images.
        batch_size: images per step, in training and in evaluation: the layer norm spans the batch.
        lr, weight_decay: AdamW's.
        width, depth, patch: the classifier's.
        seed: of the initial weights and of the order of the images.
        split_seed: of the split into training and validation images.
        precision: "fp32", or "bf16" by torch.autocast.
        limit: use only the first so many images of each of the three sets.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = 5
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    width: int = 32
    depth: int = 5
    patch: int = 4
    seed: int = 0
    split_seed: int = 55
    precision: str = "fp32"
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "width", "depth", "patch", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        for name in ("seed", "split_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 2**32 - 1")
        if not 0 < self.lr <= LARGEST_LR:
            raise ValueError(f"lr is {self.lr}; expected a positive number, at most {LARGEST_LR:g}")
        if not 0 <= self.weight_decay <= LARGEST_WEIGHT_DECAY:
            raise ValueError(f"weight_decay is {self.weight_decay}; expected 0 to {LARGEST_WEIGHT_DECAY:g}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")


class Observer(Protocol):
    """What is told of a run's progress."""

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_second: float) -> None:
        """Steps `step` of `steps` of an epoch, counted from 1, are done. Called a few times per second."""

    def epoch(self, history: Sequence[dict[str, float]]) -> None:
        """An epoch and its validation are done; `history` has the metrics of each one so far."""


@dataclass(frozen=True)
class Sets:
    """The images to train, validate and test on, on the training device."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def make_sets(dataset: Dataset, recipe: Recipe, device: torch.device) -> Sets:
    """Split the training images by the recipe.

    Raises:
        DataError: there are too few to validate on.
    """
    count = len(dataset.train)
    # A fifth of them, rounded down.
    if count < 5:
        raise DataError(f"{dataset.source}: {count} training images leave none to validate on; expected 5 or more")
    train, validation = split_indices(count, recipe.split_seed)
    return Sets(
        dataset.train.subset(train[: recipe.limit]).to(device),
        dataset.train.subset(validation[: recipe.limit]).to(device),
        dataset.test.subset(torch.arange(len(dataset.test))[: recipe.limit]).to(device),
    )


def check_patch(recipe: Recipe, image_size: Sequence[int]) -> None:
    """Raise ValueError if images (channels, height, width) are too small for the classifier's patches."""
    _, height, width = image_size
    if min(height, width) < 2 * recipe.patch:
        raise ValueError(
            f"patch is {recipe.patch}, for images of {height} x {width} pixels; "
            f"expected at most {min(height, width) // 2}"
        )


def make_model(recipe: Recipe, image_size: Sequence[int], classes: int) -> Classifier:
    """The classifier with the initial weights of the recipe's seed.

    Raises:
        ValueError: the images are too small for its patches.
    """
    check_patch(recipe, image_size)
    torch.manual_seed(recipe.seed)
    return Classifier(recipe.width, recipe.depth, recipe.patch, image_size[0], classes)


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order of the training images, int64 [images]: a function of seed and epoch, so nothing to save."""
    # PyTorch's CPU generator looks at 32 bits of its seed only. Python's hashes a string to seed itself.
    mixed = random.Random(f"seed {seed} epoch {epoch}").getrandbits(32)
    return torch.randperm(images, generator=torch.Generator().manual_seed(mixed))


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageSet, recipe: Recipe) -> tuple[float, float]:
    """Return the mean loss, and the accuracy in [0, 1], over all images, in batches of the recipe's size."""
    device = images.images.device
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    model.eval()
    for x, labels in images.batches(recipe.batch_size):
        with autocast(recipe, device):
            logits = model(x)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    model.train()
    return loss.item() / len(images), correct.item() / len(images)


def train(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    path: Path,
    observer: Observer,
    resumed: Checkpoint | None,
) -> Checkpoint:
    """Train until the recipe's last epoch is done, and keep the state at `path`.

    The state is saved at the start, after each epoch, and every half minute; a run that is killed at any moment
    and resumed reaches the weights of one that is not, bit for bit on a CPU.

    Args:
        path: of the checkpoint.
        observer: is told of the progress.
        resumed: a checkpoint to go on from, of the same recipe but for the number of epochs.

    Returns:
        The final checkpoint, with the metrics on the test set.

    Raises:
        NonFiniteLoss: and the checkpoint at `path` is the last one from before.
        Interrupted: Ctrl-C; the checkpoint is of the last step.
        CheckpointError: `resumed` does not fit the recipe or the data.
    """
    sets = make_sets(dataset, recipe, device)
    steps = math.ceil(len(sets.train) / recipe.batch_size)
    classes, image_size = list(dataset.classes), list(dataset.train.images.shape[1:])
    model = make_model(recipe, image_size, len(classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses = torch.zeros(steps, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    epoch, step = 0, 0
    history: list[dict[str, float]] = []
    seconds_before = 0.0
    if resumed is not None:
        check_data(resumed, classes, image_size, len(sets.train))
        restore(resumed, model, optimizer, device)
        epoch, step, history = resumed.epoch, resumed.step, resumed.history
        losses[:step] = resumed.losses
        correct += resumed.correct
        seconds_before = resumed.seconds
    keep_freed_memory()
    started = saved = time.monotonic()

    def save(test: dict[str, float] | None = None) -> Checkpoint:
        check_finite(losses[:step], epoch, model)
        state = Checkpoint(
            recipe=asdict(recipe),
            classes=classes,
            image_size=image_size,
            train_images=len(sets.train),
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            rng=rng_state(device),
            epoch=epoch,
            step=step,
            losses=losses[:step].clone(),
            correct=int(correct),
            history=history,
            test=test,
            seconds=seconds_before + time.monotonic() - started,
        )
        state.save(path)
        return state

    with interruption() as interrupted:
        if resumed is None:
            save()
        while epoch < recipe.epochs:
            order = epoch_order(len(sets.train), recipe.seed, epoch).to(device)
            epoch_started, epoch_step, reported = time.monotonic(), step, 0.0
            for x, labels in sets.train.batches(recipe.batch_size, order[step * recipe.batch_size :]):
                with autocast(recipe, device):
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad()
                # Here, not in autograd's thread for a GPU, where the host is slower: bench/NOTES.md.
                with torch.autograd.set_multithreading_enabled(False):
                    loss.backward()
                optimizer.step()
                losses[step] = loss.detach()
                correct += (logits.argmax(1) == labels).sum()
                step += 1

                now = time.monotonic()
                if now - reported > REPORT_SECONDS or step == steps:
                    check_finite(losses[:step], epoch, model)
                    speed = (step - epoch_step) * recipe.batch_size / (now - epoch_started)
                    observer.step(epoch + 1, step, steps, losses[step - 1].item(), speed)
                    reported = now
                if interrupted():
                    save()
                    raise Interrupted(f"interrupted in epoch {epoch + 1}, after step {step} of {steps}")
                if now - saved > SAVE_SECONDS:
                    save()
                    saved = now

            validation_loss, validation_accuracy = evaluate(model, sets.validation, recipe)
            history.append(
                {
                    "epoch": epoch + 1,
                    "train_loss": mean_loss(losses, len(sets.train), recipe.batch_size),
                    "train_accuracy": correct.item() / len(sets.train),
                    "validation_loss": validation_loss,
                    "validation_accuracy": validation_accuracy,
                    "seconds": seconds_before + time.monotonic() - started,
                }
            )
            epoch, step = epoch + 1, 0
            correct.zero_()
            save()
            saved = time.monotonic()
            observer.epoch(history)
            if interrupted() and epoch < recipe.epochs:
                raise Interrupted(f"interrupted after epoch {epoch}")

    test_loss, test_accuracy = evaluate(model, sets.test, recipe)
    return save({"test_loss": test_loss, "test_accuracy": test_accuracy})


def mean_loss(losses: Tensor, images: int, batch_size: int) -> float:
    """The mean over images of the losses of an epoch's steps, each the mean over its batch."""
    sizes = torch.full_like(losses, batch_size, dtype=torch.float64, device="cpu")
    sizes[-1] = images - batch_size * (len(losses) - 1)
    return (losses.cpu().double() * sizes).sum().item() / images


def check_finite(losses: Tensor, epoch: int, model: nn.Module) -> None:
    """Raise NonFiniteLoss and say at which step of the epoch, if a loss or a weight is not finite."""
    wrong = (~losses.isfinite()).nonzero()
    if len(wrong) > 0:
        step = int(wrong[0])
        raise NonFiniteLoss(f"the loss is {losses[step].item()} in epoch {epoch + 1}, step {step + 1}")
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise NonFiniteLoss(f"a weight is not finite in epoch {epoch + 1}, after step {len(losses)}")


def check_data(resumed: Checkpoint, classes: list[str], image_size: list[int], train_images: int) -> None:
    for what, trained_on, given in [
        ("classes", resumed.classes, classes),
        ("image size", resumed.image_size, image_size),
        ("number of training images", resumed.train_images, train_images),
    ]:
        if trained_on != given:
            raise CheckpointError(
                f"the data has another {what} than the checkpoint: {given}, expected {trained_on}; "
                "give the data that it was trained on"
            )


def restore(
    resumed: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> None:
    """Load a checkpoint's state into a model, and the optimizer and generators if the run goes on.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        model.load_state_dict(resumed.model)
        if optimizer is not None:
            optimizer.load_state_dict(resumed.optimizer)
            torch.set_rng_state(resumed.rng["cpu"])
            if device.type == "cuda" and "cuda" in resumed.rng:
                torch.cuda.set_rng_state(resumed.rng["cuda"], device)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint's state does not fit its own recipe ({reason})") from error


def rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that a step is finished; the second one interrupts at once."""
    received = False

    def note(number: int, frame: object) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGINT, before)
