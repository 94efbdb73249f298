"""Several processes compute what one does: operations on parts of a batch, whole trainings, and resumed ones."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from together import train

from fastconv.checking.divergence import FLOOR, MARGIN, largest_difference
from fastconv.training import checkpoint, loop
from fastconv.training.recipe import Recipe

TOGETHER = Path(__file__).with_name("together.py")


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_operations(count):
    run_ranks(count, TOGETHER, "numbers", timeout=300)


# The last batch of an epoch has two images: with more processes some have none.
RECIPE = {"epochs": 8, "batch_size": 13, "width": 4, "depth": 1, "patch": 2, "seed": 7}
MODERN = {"norm": "sample", "crop": 1, "flip": True, "label_smoothing": 0.1, "schedule": "linear", "ema": 0.9}
COUNTS = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


def train_together(count, folder, recipe, *stop):
    """The checkpoint that so many processes leave in a folder, and the losses of their steps."""
    folder.mkdir(exist_ok=True)
    run_ranks(count, TOGETHER, "training", folder, recipe, *stop)
    return checkpoint.load(folder / "checkpoint.pt"), torch.load(folder / "losses.pt")


def train_alone(folder, recipe, neighbour=False):
    folder.mkdir()
    losses = train(Recipe(**recipe), folder, neighbour=neighbour)
    return checkpoint.load(folder / "checkpoint.pt"), losses


def flat(found):
    """All weights of a checkpoint, the averaged ones first if there are any."""
    states = [state for state in (found.averaged, found.model) if state is not None]
    return torch.cat([x.flatten().double() for state in states for x in state.values()])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{recipe: the run of one process, and of one that begins with neighbouring weights}"""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "REPORT_SECONDS", -1.0)
        return {
            name: [train_alone(folder / f"{name} {neighbour}", recipe, neighbour) for neighbour in (False, True)]
            for name, recipe in {"lecture": RECIPE, "modern": RECIPE | MODERN}.items()
        }


def assert_same_run(found, losses, expected):
    """It differs from the run of one process by no more than MARGIN times what neighbouring weights do.

    Each step changes each weight by the learning rate, whatever its gradient: where that is near 0 rounding decides.
    """
    (one, steps), (neighbour, other_steps) = expected
    assert len(steps) >= 50
    bound = max(FLOOR, MARGIN * largest_difference(other_steps, steps))
    assert largest_difference(losses, steps) <= bound
    bound = MARGIN * (flat(neighbour) - flat(one)).norm()
    assert (flat(found) - flat(one)).norm() <= bound
    for mine, other in zip(found.history, one.history, strict=True):
        assert mine["validation_accuracy"] == pytest.approx(other["validation_accuracy"], abs=0.051)
        for name in ("train_loss", "validation_loss"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3)
    assert found.test["test_loss"] == pytest.approx(one.test["test_loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["lecture", "modern"])
@pytest.mark.parametrize("count", COUNTS)
def test_a_training_is_that_of_one_process(tmp_path, alone, count, name):
    recipe = RECIPE if name == "lecture" else RECIPE | MODERN
    assert_same_run(*train_together(count, tmp_path / "run", recipe), alone[name])
