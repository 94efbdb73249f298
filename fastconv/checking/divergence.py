"""Trains the fused and the reference classifier from the same weights: only rounding may make their losses differ.

How far it does is measured: the reference is trained again from weights that are moved to neighbouring floats.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconv.machine import keep_freed_memory
from fastconv.modules import Classifier
from fastconv.operations import reference

STEPS = 50
CLASSES = 10
# The share of its class's own picture in an image; the rest is noise.
SIGNAL = 0.3
# How much further apart another order of summation may take the losses than neighbouring weights do. In sixteen
# runs it was at most 1.9 times as far. The smallest of the bugs tried, GELU by tanh, makes it 600 times.
MARGIN = 10.0
# A few roundings of the loss itself, for losses that hardly differ yet.
FLOOR = 2e-6


class Size(NamedTuple):
    """The sizes of a classifier, and of the images that it learns from."""

    width: int
    depth: int
    patch: int
    image: int
    batch: int


LECTURE = Size(width=32, depth=5, patch=4, image=32, batch=32)
# Triton's interpreter takes a second and a half for a step even of this one.
SMALL = Size(width=4, depth=1, patch=4, image=16, batch=8)


@dataclass(frozen=True)
class Divergence:
    """The losses of each step, for both classifiers, and for the reference from neighbouring weights."""

    fused: Tensor
    reference: Tensor
    neighbour: Tensor

    @property
    def difference(self) -> float:
        return largest_difference(self.fused, self.reference)

    @property
    def bound(self) -> float:
        """The largest difference that is right."""
        return max(FLOOR, MARGIN * largest_difference(self.neighbour, self.reference))

    @property
    def right(self) -> bool:
        # False for a NaN too.
        return self.difference <= self.bound


def largest_difference(losses: Tensor, expected: Tensor) -> float:
    """The largest difference of all steps, relative to the expected loss; NaN if a loss is."""
    return ((losses - expected).abs() / expected).max().item()


def measure(device: torch.device, size: Size, stepped: Callable[[], None]) -> Divergence:
    """Train three times; `stepped` is called after each step."""
    keep_freed_memory()
    torch.manual_seed(0)
    plain = reference.Classifier(size.width, size.depth, size.patch)
    fused = Classifier(size.width, size.depth, size.patch)
    fused.load_state_dict(plain.state_dict())
    neighbour = copy.deepcopy(plain)
    move_to_neighbours(neighbour)
    return Divergence(*(train(model.to(device), size, stepped) for model in (fused, plain, neighbour)))


@torch.no_grad()
def move_to_neighbours(model: nn.Module) -> None:
    """Move each weight to the next float above or below, as the random state decides."""
    for p in model.parameters():
        p.copy_(torch.nextafter(p, torch.where(torch.rand_like(p) < 0.5, torch.inf, -torch.inf)))


def train(model: nn.Module, size: Size, stepped: Callable[[], None]) -> Tensor:
    """The losses, float64 [STEPS], of AdamW on images that are their class's own random picture, and noise."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(CLASSES, 3, size.image, size.image, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (size.batch,), generator=generator)
        noise = torch.rand(size.batch, 3, size.image, size.image, generator=generator)
        images = SIGNAL * pictures[labels] + (1 - SIGNAL) * noise
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        stepped()
    return torch.stack(losses).double().cpu()
