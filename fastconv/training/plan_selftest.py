"""Tests the plan of a training step once, on a GPU on which nobody has proved its kernels.

Loss and gradients of one batch are compared with those of the reference in float64, as those of single operations
are in `fastconv.operations.selftest`, whose setting counts here too.
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
from fastconv.training.recipe import DTYPES, Recipe, autocast
from fastconv.training.sets import Batches
from fastconv.training.stepper import AutogradStepper

# How much farther off than PyTorch's a gradient may be. Each block amplifies the rounding of those behind it; what
# is wrong is off by far more.
MARGIN = 10.0
# The least norm to divide by, in norms of the largest gradient: with one channel that of the stem's bias is zero.
LEAST_SCALE = 1e-3


def why_wrong(stepper: AutogradStepper, size: int, make_planned: Callable[[AutogradStepper], Any]) -> str | None:
    """Return why steps of `size` images may not be planned; None if they may. The verdict is kept in a file."""
    device = stepper.batches.position.device
    if backends.current() != "auto" or selftest.status(device) != "tested at first use":
        return None
    subject = describe(stepper, size)
    verdict = verdicts.load("triton", device).get(subject)
    if verdict is None:
        verdict = judge(stepper, size, make_planned)
        verdicts.save("triton", device, subject, verdict)
    return None if verdict.right else f"it failed its self-test: {verdict.reason}"


def describe(stepper: AutogradStepper, size: int) -> str:
    """Return what decides which kernels a step compiles to, in words."""
    recipe, images = stepper.recipe, stepper.batches.images.images
    classes = len(stepper.model.get_parameter("bottleneck.bias"))
    model = f"width {recipe.width}, depth {recipe.depth}, patch {recipe.patch}, {classes} classes"
    *_, height, width = images.shape
    return f"training step, {recipe.precision}, {model}, {size} images of {height} x {width}"


def judge(stepper: AutogradStepper, size: int, make_planned: Callable[[AutogradStepper], Any]) -> Verdict:
    """Compare losses and gradients of the first images, by a copy of the model."""
    recipe = stepper.recipe
    batches = Batches(stepper.batches.images, stepper.batches.batch_size)
    order = torch.arange(size)
    batches.start(order)
    images, labels = batches.next(size)
    twin = copy.deepcopy(stepper.model)
    weights = {name: p.detach().clone() for name, p in twin.named_parameters()}
    optimizer = torch.optim.AdamW(twin.parameters(), lr=recipe.lr)
    planned = make_planned(AutogradStepper(twin, optimizer, recipe, batches))
    # Before the step, which changes the weights.
    for run in (planned.evaluate, planned.train):
        batches.start(order)
        run(size)
    losses = {"the loss": planned.trained.losses[0], "the loss in evaluation": planned.evaluated.losses[0]}
    ours = losses | planned.flat.views(planned.flat.gradients)
    exact = losses_and_gradients(recipe, weights, images.double(), labels)
    pytorch = losses_and_gradients(recipe, weights, images, labels)
    floor = accuracy.FLOOR[DTYPES[recipe.precision]]
    # A gradient that is nearly zero is judged beside the others.
    least = LEAST_SCALE * max(expected.norm().item() for name, expected in exact.items() if name in weights)
    for name, expected in exact.items():
        scale = max(expected.norm().item(), least)
        error = (ours[name] - expected).norm().item() / scale
        bound = MARGIN * max(floor, (pytorch[name] - expected).norm().item() / scale)
        # Not the other way round: false for a NaN.
        if not error <= bound:
            return Verdict(False, f"{name} has error {error:.1e}; at most {bound:.1e} is right")
    return Verdict(True, "")


def losses_and_gradients(
    recipe: Recipe, weights: dict[str, Tensor], images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Return the reference's, float64 by name: as the recipe computes, or exact for float64 images."""
    outputs = len(weights["bottleneck.bias"])
    model = reference.Classifier(recipe.width, recipe.depth, recipe.patch, images.shape[1], outputs)
    model.load_state_dict(weights)
    model.to(images.device, images.dtype)
    with autocast(recipe, images.device, enabled=images.dtype != torch.float64):
        logits = model(images)
    loss = F.cross_entropy(logits.to(images.dtype), labels)
    found = torch.autograd.grad(loss, list(model.parameters()))
    gradients = {name: grad.double() for (name, _), grad in zip(model.named_parameters(), found, strict=True)}
    return {"the loss": loss.double(), "the loss in evaluation": loss.double(), **gradients}
