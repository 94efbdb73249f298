"""Whether the parts of a checkpoint fit together: a file may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastconv.training.recipe import LARGEST, check_images, parameter_groups, shape_of_model

if TYPE_CHECKING:
    from fastconv.training.checkpoint import Checkpoint

METRICS = {
    *("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"),
    *("seconds", "evaluation_seconds"),
}
TEST_METRICS = {"test_loss", "test_accuracy"}


def check(found: Checkpoint) -> None:
    """Raise ValueError, which names the part, if no training can have come to this state.

    Parts have the right types. No more memory is taken than the file has bytes, whatever sizes it claims.
    """
    check_numbers(found)
    check_images(found.recipe, found.image_size)
    model = shape_of_model(found.recipe, found.image_size, len(found.classes))
    check_tensors("model", found.model, model.state_dict())
    if (found.averaged is not None) is not (found.recipe.ema > 0):
        raise ValueError("its averaged weights are missing, or of a recipe without an ema")
    check_tensors("averaged", found.averaged or {}, model.state_dict() if found.averaged is not None else {})
    # AdamW counts parameters in the order of its groups.
    weights = [weight for group in parameter_groups(model, found.recipe) for weight in group["params"]]
    check_optimizer(found.optimizer, weights, started=found.epoch + found.step > 0)
    check_rng(found.rng)


def check_numbers(found: Checkpoint) -> None:
    recipe, metrics = found.recipe, [*found.history, found.test or {}]
    steps = -(-found.train_images // recipe.batch_size)
    finished = found.epoch == recipe.epochs
    for part, right in {
        "classes": len(found.classes) > 0,
        "image_size": len(found.image_size) == 3 and found.image_size[0] == 3,
        "train_images": 0 < found.train_images <= LARGEST["limit"],
        "epoch": 0 <= found.epoch <= recipe.epochs,
        "step": 0 <= found.step <= (0 if finished else steps),
        "losses": found.losses.shape == (found.step,)
        and found.losses.dtype == torch.float32
        and bool(found.losses.isfinite().all()),
        "correct": 0 <= found.correct <= found.step * recipe.batch_size,
        "history": len(found.history) == found.epoch
        and all(each.keys() == METRICS and each["epoch"] == i for i, each in enumerate(found.history, 1)),
        "test": found.test is None or (found.test.keys() == TEST_METRICS and finished),
        # A loss is float32. Larger ones could not be drawn.
        "metrics": all(0 <= value < 3.5e38 for each in metrics for value in each.values()),
        "seconds": 0 <= found.evaluation_seconds <= found.seconds < 3.5e38,
    }.items():
        if not right:
            raise ValueError(f"its {part} cannot come from a run of its recipe")


def check_tensors(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless names, shapes and dtypes are those of `expected`, and all numbers are finite."""
    if odd := sorted(found.keys() ^ expected.keys()):
        state = "lacks" if odd[0] in expected else "has an unknown"
        raise ValueError(f"its {name} {state} {odd[0]!r}")
    for key, tensor in found.items():
        shape, dtype = expected[key].shape, expected[key].dtype
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"its {name}'s {key} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"its {name}'s {key} holds numbers that are not finite")


def check_optimizer(state: Mapping[int, Mapping[str, Tensor]], weights: list[Tensor], started: bool) -> None:
    """Raise ValueError unless `state` is AdamW's of these weights; before the first step it has none."""
    if list(state) != list(range(len(weights) if started else 0)):
        raise ValueError("its optimizer's state is not one for each weight")
    step = torch.empty((), device="meta")
    for i, weight in enumerate(weights if started else []):
        check_tensors(f"optimizer's state {i}", state[i], {"step": step, "exp_avg": weight, "exp_avg_sq": weight})
        if state[i]["step"] < 1 or (state[i]["exp_avg_sq"] < 0).any():
            raise ValueError(f"its optimizer's state {i} is negative")


def check_rng(states: Mapping[str, Tensor]) -> None:
    if not {"cpu"} <= states.keys() <= {"cpu", "cuda"}:
        raise ValueError("its rng has not the states of the devices cpu, and of cuda where it ran there")
    try:
        torch.Generator().set_state(states["cpu"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"its rng's state is none of PyTorch's ({' '.join(str(error).split())})") from error
