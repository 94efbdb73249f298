"""Tests the plan of a training step once, on a GPU on which nobody has proved its kernels.

The gradients of one batch are compared with those of the reference in float64, as those of single operations are
in `fastconv.operations.selftest`, whose setting counts here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv import accuracy
from fastconv.operations import backends, reference, selftest, verdicts
from fastconv.operations.verdicts import Verdict
from fastconv.training.recipe import Recipe, autocast
from fastconv.training.sets import Batches
from fastconv.training.stepper import AutogradStepper

FLOORS = {"fp32": accuracy.FLOOR[torch.float32], "bf16": accuracy.FLOOR[torch.bfloat16]}
# How much farther off than PyTorch's a gradient may be. Each block amplifies the rounding of those behind it; what
# is wrong is off by far more.
MARGIN = 10.0


def why_wrong(stepper: AutogradStepper, make_planned: Callable[[AutogradStepper], Any]) -> str | None:
    """Return why steps may not be planned; None if they may. The verdict is kept for other processes."""
    device = stepper.batches.position.device
    if backends.current() != "auto" or selftest.status(device) != "tested at first use":
        return None
    subject = describe(stepper)
    verdict = verdicts.load(device).get(subject)
    if verdict is None:
        verdict = judge(stepper, make_planned)
        verdicts.save(device, subject, verdict)
    return None if verdict.right else f"it failed its self-test: {verdict.reason}"


def describe(stepper: AutogradStepper) -> str:
    """Return what decides which kernels a step compiles to, in words."""
    recipe, images = stepper.recipe, stepper.batches.images.images
    *_, height, width = images.shape
    size = f"width {recipe.width}, depth {recipe.depth}, patch {recipe.patch}, batch {batch_size(stepper)}"
    return f"training step, {recipe.precision}, {size}, images {height} x {width}"


def batch_size(stepper: AutogradStepper) -> int:
    return min(stepper.batches.batch_size, len(stepper.batches.images))


def judge(stepper: AutogradStepper, make_planned: Callable[[AutogradStepper], Any]) -> Verdict:
    """Compare the gradients of the first images, by a copy of the model."""
    size, recipe = batch_size(stepper), stepper.recipe
    batches = Batches(stepper.batches.images, stepper.batches.batch_size)
    batches.start(torch.arange(size))
    images, labels = batches.next(size)
    batches.start(torch.arange(size))
    twin = copy.deepcopy(stepper.model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=recipe.lr)
    weights = {name: p.detach().clone() for name, p in twin.named_parameters()}
    planned = make_planned(AutogradStepper(twin, optimizer, recipe, batches))
    planned.train(size)
    ours = planned.flat.views(planned.flat.gradients)
    exact = gradients(recipe, weights, images.double(), labels)
    pytorch = gradients(recipe, weights, images, labels)
    for name, expected in exact.items():
        scale = expected.norm().item()
        error = (ours[name] - expected).norm().item() / scale
        bound = MARGIN * max(FLOORS[recipe.precision], (pytorch[name] - expected).norm().item() / scale)
        # Not the other way round: false for a NaN.
        if not error <= bound:
            return Verdict(False, f"the gradient of {name} has error {error:.1e}; at most {bound:.1e} is right")
    return Verdict(True, "")


def gradients(recipe: Recipe, weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the reference's gradients, float64 by name: as the recipe computes, exact for float64 images."""
    classes = len(weights["bottleneck.bias"])
    model = reference.Classifier(recipe.width, recipe.depth, recipe.patch, images.shape[1], classes)
    model.load_state_dict(weights)
    model.to(images.device, images.dtype)
    with autocast(recipe, images.device, enabled=images.dtype != torch.float64):
        logits = model(images)
    loss = F.cross_entropy(logits.to(images.dtype), labels)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return {name: grad.double() for (name, _), grad in zip(model.named_parameters(), found, strict=True)}
