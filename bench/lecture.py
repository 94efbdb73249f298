"""The lecture's program, written from its description: what `fastconv train` is compared with, end to end.

It uses PyTorch's defaults, as courses do: torchvision turns one image after the other into a tensor, a loader
without worker processes collates them, and a wrapper moves each batch to the device. After each epoch it evaluates
the whole training set, then the validation set. A `Clock` measures the parts. Accuracies count images; the lecture
divides by batches x 128, which makes its own slightly low.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, random_split
from torchvision import datasets, transforms

from fastconv import reference
from fastconv.training.data import ImageSet

from .clock import Clock

BATCH_SIZE = 128
LEARNING_RATE = 1e-3
SPLIT_SEED = 55
# The parts of an epoch; each of them loads batches, moves them, and computes.
TRAINING, EVALUATION, VALIDATION = "training", "evaluation on training images", "evaluation on validation images"
LOADING, MOVING = "loading", "moving"

Batch = tuple[Tensor, Tensor]


class CIFAR10(datasets.CIFAR10):  # type: ignore[misc]
    """torchvision's data set over images that were read before: the official Python version is not needed.

    An item costs what torchvision's costs: the method that makes it is inherited, and the array has its strides.
    """

    def __init__(self, images: ImageSet) -> None:
        datasets.VisionDataset.__init__(self, root="", transform=transforms.ToTensor())
        self.data = images.images.permute(0, 2, 3, 1).numpy()
        self.targets = images.labels.tolist()


class DeviceLoader:
    """The batches of a loader, moved to a device."""

    def __init__(self, loader: Iterable[Batch], device: torch.device, clock: Clock) -> None:
        self.loader, self.device, self.clock = loader, device, clock

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.clock.each(LOADING, self.loader):
            with self.clock.part(MOVING):
                batch = images.to(self.device), labels.to(self.device)
            yield batch


def run(
    images: ImageSet, classes: int, device: torch.device, epochs: int, clock: Clock, limit: int | None = None
) -> list[dict[str, float]]:
    """Train and evaluate.

    Args:
        images: training images, on the CPU; the lecture's are CIFAR-10's.
        classes: how many classes they are of.
        clock: measures the parts of all epochs.
        limit: use only the first so many training and validation images.

    Returns:
        The metrics of each epoch, named as `fastconv train` names them.
    """
    training, validation = (
        DeviceLoader(DataLoader(part, batch_size=BATCH_SIZE, shuffle=True), device, clock)
        for part in split(images, limit)
    )
    model = reference.Classifier(num_classes=classes).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    history: list[dict[str, float]] = []
    for _ in range(epochs):
        with clock.part(TRAINING):
            train(model, training, criterion, optimizer)
        with clock.part(EVALUATION):
            train_loss, train_accuracy = evaluate(model, training, criterion)
        with clock.part(VALIDATION):
            validation_loss, validation_accuracy = evaluate(model, validation, criterion)
        history.append(
            {
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "validation_loss": validation_loss,
                "validation_accuracy": validation_accuracy,
            }
        )
    return history


def split(images: ImageSet, limit: int | None) -> list[Subset[Batch]]:
    """The training images and the validation images, and of each the first `limit`."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: list[Subset[Batch]] = random_split(CIFAR10(images), [0.8, 0.2], generator=generator)
    return [Subset(part.dataset, part.indices[:limit]) for part in parts]


def train(
    model: nn.Module, batches: Iterable[Batch], criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], criterion: nn.Module) -> tuple[float, float]:
    """Return the mean loss, and the accuracy in [0, 1], over all images."""
    model.eval()
    total, correct, count = 0.0, 0, 0
    for images, labels in batches:
        logits = model(images)
        total += criterion(logits, labels).item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return total / count, correct / count
