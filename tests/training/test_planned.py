"""Training by plans of Triton launches: the same numbers as by autograd, and a way back where they cannot run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastconv
from fastconv.checking import graphs
from fastconv.kernels.common.errors import KernelError
from fastconv.operations import selftest
from fastconv.training import checkpoint, loop, plan_selftest
from fastconv.training.data import Dataset, ImageSet
from fastconv.training.planned import PlannedStepper
from fastconv.training.recipe import INGREDIENTS, RECIPES, Recipe
from fastconv.training.stepper import AutogradStepper

pytest.importorskip("triton")
# 8 images to train on: a batch of 5, and one of 3. Interpreted, each step takes a second.
RECIPE = Recipe(epochs=2, batch_size=5, width=2, depth=1, patch=2, train_metrics="running")


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)

    def images(count):
        pixels = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.arange(count) % 3)

    return Dataset(images(10), images(3), ("a", "b", "c"), "random pictures")


class Notes(loop.Observer):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def train(dataset, device, path, recipe=RECIPE, resumed=None):
    observer = Notes()
    final = loop.train(recipe, dataset, torch.device(device), path, observer, resumed, "off")
    assert observer.notes == []
    return final


def stepper_of(dataset, device, recipe=RECIPE, note=None):
    state = loop.prepare(recipe, dataset, torch.device(device), None)
    state.choose_steps("off", note or (lambda text: pytest.fail(text)))
    return state.stepper


def assert_close(final, expected):
    """As close as after four steps in another order of summation."""
    for name, weight in expected.model.items():
        torch.testing.assert_close(final.model[name].cpu(), weight.cpu(), rtol=1e-4, atol=2e-6)
    for i, state in expected.optimizer.items():
        for name, value in state.items():
            torch.testing.assert_close(final.optimizer[i][name].cpu(), value.cpu(), rtol=1e-3, atol=1e-7)
    for mine, other in zip(final.history, expected.history, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert mine["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)
        assert mine["train_accuracy"] == other["train_accuracy"]
    assert final.test["test_loss"] == pytest.approx(expected.test["test_loss"], rel=1e-5)


def test_it_trains_as_by_autograd_and_checkpoints_move_both_ways(dataset, device, tmp_path):
    assert isinstance(stepper_of(dataset, device), PlannedStepper)
    with fastconv.backend("reference"):
        expected = train(dataset, device, tmp_path / "reference.pt")
        half = Recipe(**{**vars(RECIPE), "epochs": 1})
        train(dataset, device, tmp_path / "half.pt", half)
    assert_close(train(dataset, device, tmp_path / "planned.pt"), expected)
    # The first epoch by autograd, the second planned; then a third by autograd.
    path = tmp_path / "half.pt"
    assert_close(train(dataset, device, path, resumed=checkpoint.load(path)), expected)
    longer = Recipe(**{**vars(RECIPE), "epochs": 3})
    with fastconv.backend("reference"):
        final = train(dataset, device, path, longer, checkpoint.load(path))
        expected = train(
            dataset, device, tmp_path / "reference.pt", longer, checkpoint.load(tmp_path / "reference.pt")
        )
    assert_close(final, expected)


def test_in_bfloat16_the_weights_stay_float32(dataset, device, tmp_path):
    recipe = Recipe(**{**vars(RECIPE), "precision": "bf16", "epochs": 1})
    final = train(dataset, device, tmp_path / "planned.pt", recipe)
    with fastconv.backend("reference"):
        expected = train(dataset, device, tmp_path / "reference.pt", recipe)
    assert {weight.dtype for weight in final.model.values()} == {torch.float32}
    loss = expected.history[0]["validation_loss"]
    assert final.history[0]["validation_loss"] == pytest.approx(loss, rel=1e-2)
    assert final.history[0]["validation_loss"] != loss


@pytest.mark.parametrize("options", [{"width": 65}, {"patch": 1}], ids=str)
def test_what_has_no_plan_is_trained_by_autograd(dataset, device, options):
    images = torch.zeros(10, 3, 17, 16, dtype=torch.uint8)
    large = Dataset(ImageSet(images, torch.arange(10) % 3), dataset.test, dataset.classes, "large")
    recipe = Recipe(**{**vars(RECIPE), **options})
    state = loop.prepare(recipe, Dataset(large.train, large.train, large.classes, ""), torch.device(device), None)
    state.choose_steps("off", pytest.fail)
    assert isinstance(state.stepper, AutogradStepper)


def test_kernels_that_cannot_run_leave_it_to_autograd(dataset, device, monkeypatch):
    from fastconv.kernels.classifier import plan

    def fail(self):
        raise KernelError("head", "too large")

    monkeypatch.setattr(plan.Plan, "prepare", fail)
    notes = []
    assert isinstance(stepper_of(dataset, device, note=notes.append), AutogradStepper)
    expected = (
        "Steps run operation by operation, not as one plan of Triton launches: kernel head cannot run (too large)"
    )
    assert notes == [expected]


def test_the_plan_is_of_the_steps_that_there_are(dataset, device):
    stepper = stepper_of(dataset, device, Recipe(**{**vars(RECIPE), "batch_size": 1000}))
    (plan,) = stepper._training
    assert plan == 8


@pytest.fixture
def unproved(monkeypatch, tmp_path):
    """A machine on which `auto` has Triton test itself."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selftest, "status", lambda device: "tested at first use")
    monkeypatch.setattr(plan_selftest, "backends", SimpleNamespace(current=lambda: "auto"))


@pytest.mark.parametrize(("precision", "width"), [("fp32", 2), ("bf16", 2), ("fp32", 1)])
def test_right_steps_are_planned_after_one_test(dataset, device, unproved, monkeypatch, precision, width):
    """With a width of 1 the exact gradient of the stem's bias is zero."""
    judged = []
    judge = plan_selftest.judge
    monkeypatch.setattr(plan_selftest, "judge", lambda *given: judged.append(judge(*given)) or judged[-1])
    recipe = Recipe(**{**vars(RECIPE), "precision": precision, "width": width})
    for _ in range(2):
        assert isinstance(stepper_of(dataset, device, recipe), PlannedStepper)
    assert [verdict.right for verdict in judged] == [True]


@pytest.mark.parametrize("wrong", ["bottleneck.bias", "the loss", "the loss in evaluation"])
def test_wrong_steps_are_not_planned(dataset, device, unproved, monkeypatch, wrong):
    """One number is off by 1 %."""
    method = "evaluate" if wrong.endswith("evaluation") else "train"
    original = getattr(PlannedStepper, method)

    def spoil(self, size):
        original(self, size)
        gradients = self.flat.views(self.flat.gradients)
        losses = {"the loss": self.trained.losses, "the loss in evaluation": self.evaluated.losses}
        (gradients | losses)[wrong][0] *= 1.01

    monkeypatch.setattr(PlannedStepper, method, spoil)
    for _ in range(2):
        notes = []
        assert isinstance(stepper_of(dataset, device, note=notes.append), AutogradStepper)
        assert f"it failed its self-test: {wrong} has error" in notes[0]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ingredients", [{}, {name: getattr(RECIPES["modern"], name) for name in INGREDIENTS}])
def test_graphs_change_no_bit(backend, precision, ingredients, monkeypatch):
    average = {"ema": 0.9} if ingredients else {}
    changes = {"precision": precision, **ingredients, **average}
    monkeypatch.setattr(graphs, "RECIPE", replace(graphs.RECIPE, **changes))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with fastconv.backend(backend):
        assert graphs.compare(torch.device("cuda"), lambda: None) is None


@pytest.mark.gpu
def test_the_host_never_waits_for_a_step(dataset):
    stepper = stepper_of(dataset, "cuda")
    sizes = stepper.batches.start(torch.arange(8))
    for size in sizes:
        stepper.train(size)
    stepper.batches.start(torch.arange(8))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for size in sizes:
            stepper.train(size)
    finally:
        torch.cuda.set_sync_debug_mode("default")
