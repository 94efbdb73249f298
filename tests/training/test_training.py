"""The training loop, against one written out by hand; stopping and going on; what goes wrong."""

import math
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from synthetic import CPU, RECIPE, Recorder, assert_same_weights, images_of, run
from torch.nn import functional as F

import fastconv
from fastconv.kernels.cpu import library
from fastconv.operations import backends, reference
from fastconv.training import checkpoint, graphed, loop, memory, stepper
from fastconv.training import recipe as recipe_module
from fastconv.training import state as state_module
from fastconv.training.checkpoint import CheckpointError
from fastconv.training.data import DataError, Dataset, ImageSet
from fastconv.training.environment import Environment
from fastconv.training.prediction import load_model
from fastconv.training.recipe import Recipe, make_model
from fastconv.training.sets import Batches, epoch_order, make_sets, random_order
from fastconv.training.state import State
from fastconv.training.stepper import AutogradStepper, NonFinite, loss_and_accuracy

pytestmark = pytest.mark.usefixtures("report_every_step")


@pytest.mark.parametrize("train_metrics", ["evaluated", "running"])
def test_the_loop_is_the_lectures_recipe(train_metrics, dataset, tmp_path):
    """By hand: the lecture's model, float64, its own split, AdamW, cross-entropy, and counting over images."""
    options = {"lr": 3e-3, "weight_decay": 0.1, "seed": 3, "train_metrics": train_metrics}
    recipe = Recipe(epochs=2, batch_size=15, width=4, depth=1, patch=2, **options)
    observer = Recorder()
    final = run(dataset, tmp_path / "checkpoint.pt", recipe, observer)

    parts = torch.utils.data.random_split(range(100), [0.8, 0.2], generator=torch.Generator().manual_seed(55))
    train, validation = (torch.tensor(list(part)) for part in parts)
    torch.manual_seed(3)
    model = reference.Classifier(width=4, depth=1, patch=2, num_classes=3).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    images, labels = dataset.train.images.double() / 255, dataset.train.labels

    def evaluate(images, labels):
        with torch.no_grad():
            logits = torch.cat([model(part) for part in images.split(15)])
        return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()

    for epoch in range(2):
        order = train[epoch_order(80, 3, epoch)]
        total_loss, total_correct = 0.0, 0
        for chosen in order.split(15):
            logits = model(images[chosen])
            loss = F.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item() * len(chosen)
            total_correct += (logits.argmax(1) == labels[chosen]).sum().item()
        metrics = final.history[epoch]
        train_loss, train_accuracy = total_loss / 80, total_correct / 80
        if train_metrics == "evaluated":
            train_loss, train_accuracy = evaluate(images[train], labels[train])
        validation_loss, validation_accuracy = evaluate(images[validation], labels[validation])
        assert metrics["epoch"] == epoch + 1
        assert metrics["train_loss"] == pytest.approx(train_loss, rel=1e-4)
        assert metrics["train_accuracy"] == train_accuracy
        assert metrics["validation_loss"] == pytest.approx(validation_loss, rel=1e-4)
        assert metrics["validation_accuracy"] == validation_accuracy
    order = random_order(33, "test 55")
    test_loss, test_accuracy = evaluate(dataset.test.images[order].double() / 255, dataset.test.labels[order])
    assert final.test["test_loss"] == pytest.approx(test_loss, rel=1e-4)
    assert final.test["test_accuracy"] == test_accuracy
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(final.model[name].double(), parameter.detach(), rtol=1e-3, atol=1e-4)
    assert [step[:3] for step in observer.steps] == [(e, s, 6) for e in (1, 2) for s in range(1, 7)]
    assert [len(history) for history in observer.histories] == [1, 2]
    evaluated = {"evaluated": (80, 20), "running": (20,)}[train_metrics]
    for epoch in (1, 2):
        found = [each[1:] for each in observer.evaluations if each[0] == epoch]
        total = sum(evaluated)
        ends = [sum(evaluated[: i + 1]) for i in range(len(evaluated))]
        assert [done for done, of in found if of == total and done in ends] == ends
    assert 0 < final.evaluation_seconds < final.seconds


def test_it_learns(dataset, tmp_path):
    final = run(
        dataset, tmp_path / "checkpoint.pt", Recipe(epochs=8, batch_size=16, width=4, depth=1, patch=2, lr=1e-2)
    )
    assert final.history[-1]["train_loss"] < 0.5 * final.history[0]["train_loss"]
    assert final.test["test_accuracy"] > 0.8


def test_a_run_repeats(dataset, tmp_path):
    first, second = run(dataset, tmp_path / "a.pt"), run(dataset, tmp_path / "b.pt")
    assert_same_weights(first, second)
    other = run(dataset, tmp_path / "c.pt", Recipe(**{**vars(RECIPE), "seed": 8}))
    assert not torch.equal(first.model["stem.weight"], other.model["stem.weight"])


def test_bfloat16_trains_with_float32_weights(dataset, tmp_path):
    final = run(dataset, tmp_path / "checkpoint.pt", Recipe(**{**vars(RECIPE), "precision": "bf16"}))
    exact = run(dataset, tmp_path / "exact.pt")
    assert all(weight.dtype == torch.float32 for weight in final.model.values())
    assert final.history[-1]["train_loss"] == pytest.approx(exact.history[-1]["train_loss"], rel=0.05)
    assert not torch.equal(final.model["stem.weight"], exact.model["stem.weight"])


def test_limit_takes_the_first_images_of_each_set(dataset):
    whole, some = make_sets(dataset, RECIPE, CPU), make_sets(dataset, Recipe(limit=12), CPU)
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (80, 20, 33)
    assert len(some.images) == 36
    for name in ("train", "validation", "test"):
        for part, all_ in zip(images_of(some, name), images_of(whole, name), strict=True):
            assert torch.equal(part, all_[:12])


def test_each_image_is_in_one_set(dataset):
    """The images of a class lie together, as in a folder; each set has them in a random order."""
    by_class = Dataset(*(part.subset(part.labels.argsort()) for part in (dataset.train, dataset.test)), "abc", "")
    sets = make_sets(by_class, RECIPE, CPU)
    whole = torch.cat([by_class.train.images, by_class.test.images])
    assert torch.equal(sets.images.images.flatten(1).sort(0).values, whole.flatten(1).sort(0).values)
    for name in ("train", "validation", "test"):
        labels = images_of(sets, name)[1]
        assert not torch.equal(labels, labels.sort().values)
        assert len(labels[:12].unique()) == 3
    other = make_sets(by_class, Recipe(split_seed=56), CPU)
    assert not torch.equal(images_of(sets, "test")[1], images_of(other, "test")[1])


def shaded(count, generator):
    """Images that only their brightness tells apart, which overlaps a little."""
    labels = torch.randint(3, (count,), generator=generator)
    shade = 40 * labels + 12 * torch.randn(count, generator=generator)
    noise = torch.randint(100, (count, 3, 8, 8), generator=generator)
    return ImageSet((noise + shade[:, None, None, None]).clamp(0, 255).to(torch.uint8), labels)


def test_accuracy_does_not_depend_on_the_order_of_files(tmp_path):
    """The norm spans the batch: images that lie class by class would be normalised by their class."""
    generator = torch.Generator().manual_seed(1)
    dataset = Dataset(shaded(500, generator), shaded(2000, generator), ("dark", "grey", "bright"), "mixed")
    recipe = Recipe(epochs=4, batch_size=100, width=4, depth=1, patch=2, lr=1e-2)
    final = run(dataset, tmp_path / "checkpoint.pt", recipe)
    model = load_model(final, CPU)

    def accuracy(images, chosen):
        stepper = AutogradStepper(model, None, recipe, Batches(images, recipe.batch_size))
        return loss_and_accuracy(stepper, chosen)[1]

    def evaluated(test):
        sets = make_sets(Dataset(dataset.train, test, dataset.classes, ""), recipe, CPU)
        return accuracy(sets.images, sets.test)

    by_class = dataset.test.subset(dataset.test.labels.argsort())
    reversed_ = dataset.test.subset(torch.arange(2000).flip(0))
    expected = final.test["test_accuracy"]
    assert 0.8 < expected < 0.99
    for test in (dataset.test, reversed_, by_class):
        assert abs(evaluated(test) - expected) < 0.005
    assert accuracy(by_class, range(2000)) < expected - 0.1


def test_too_few_images_to_validate_on(dataset, tmp_path):
    few = Dataset(dataset.train.subset(torch.arange(4)), dataset.test, dataset.classes, "few")
    with pytest.raises(DataError, match="few: 4 training images leave none to validate on; expected 5 or more"):
        run(few, tmp_path / "checkpoint.pt")
    assert not (tmp_path / "checkpoint.pt").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def kill():
    raise Killed


def test_killed_anywhere_and_resumed_it_reaches_the_same_weights(dataset, tmp_path, monkeypatch):
    """Dies at every point where something is observed or written, and each time goes on from the file."""
    unbroken = run(dataset, tmp_path / "unbroken.pt")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)  # A checkpoint after every step.
    path, deaths, resumed = tmp_path / "checkpoint.pt", 0, None
    rng = random.Random(0)
    for _ in range(200):
        calls, death = 0, rng.randrange(1, 40)

        def maybe_die(original, *arguments, death=death, **options):
            nonlocal calls
            calls += 1
            if calls == death:
                raise Killed
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            for owner, name in [
                (torch, "save"),
                (os, "fsync"),
                (os, "replace"),
                (State, "evaluate"),
                (torch.optim.AdamW, "step"),
            ]:
                original = getattr(owner, name)
                # Nor does a killed process remove what it has half-written.
                patch.setattr(Path, "unlink", lambda *_, **__: None)
                patch.setattr(owner, name, lambda *a, _original=original, **o: maybe_die(_original, *a, **o))
            try:
                final = run(dataset, path, resumed=resumed)
                break
            except Killed:
                deaths += 1
        resumed = checkpoint.load(path) if path.exists() else None
    assert deaths > 10
    assert_same_weights(final, unbroken)
    for mine, other in zip(final.history, unbroken.history, strict=True):
        times = {"seconds": 0, "evaluation_seconds": 0}
        assert {**mine, **times} == {**other, **times}
    assert final.test == unbroken.test


def test_more_epochs_after_the_last_go_on_from_there(dataset, tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(dataset, path)
    longer = Recipe(**{**vars(RECIPE), "epochs": 5})
    final = run(dataset, path, longer, resumed=checkpoint.load(path))
    assert_same_weights(final, run(dataset, tmp_path / "at-once.pt", longer))
    assert final.epoch == len(final.history) == 5


@pytest.mark.parametrize(
    ("at", "number"), [((1, 2), signal.SIGINT), ((2, 5), signal.SIGTERM), ((1, 4), signal.SIGHUP)]
)
def test_interrupted_it_finishes_the_step_and_saves(dataset, tmp_path, at, number):
    path = tmp_path / "checkpoint.pt"
    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match=f"interrupted in epoch {at[0]}, after step {at[1]} of 5") as caught:
        run(dataset, path, observer=Recorder(at, lambda: signal.raise_signal(number)))
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    state = checkpoint.load(path)
    assert (state.epoch + 1, state.step) == at
    assert_same_weights(run(dataset, path, resumed=state), run(dataset, tmp_path / "unbroken.pt"))


def test_interrupted_in_an_evaluation_it_evaluates_again(dataset, tmp_path):
    path = tmp_path / "checkpoint.pt"
    observer = Recorder((2, "evaluation"), lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(loop.Interrupted, match="interrupted in epoch 2, in its evaluation"):
        run(dataset, path, observer=observer)
    state = checkpoint.load(path)
    assert (state.epoch, state.step) == (1, 5)
    # The evaluation that was interrupted counts as one.
    assert state.evaluation_seconds > state.history[0]["evaluation_seconds"]
    unbroken = run(dataset, tmp_path / "unbroken.pt")
    resumed = run(dataset, path, resumed=state)
    assert_same_weights(resumed, unbroken)
    assert [each["train_loss"] for each in resumed.history] == [each["train_loss"] for each in unbroken.history]


def test_a_second_interrupt_is_at_once(dataset, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        run(dataset, path, observer=Recorder((2, 3), twice))
    # The last one saved is that of the first epoch's end.
    assert (checkpoint.load(path).epoch, checkpoint.load(path).step) == (1, 0)


def test_a_loss_that_is_not_finite_stops_the_run(dataset, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    calls = 0
    original = F.cross_entropy

    def explode(logits, labels, **options):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return original(logits, labels, **options) * (math.nan if calls >= 8 else 1.0)

    monkeypatch.setattr(stepper.F, "cross_entropy", explode)
    with pytest.raises(NonFinite, match="the loss is nan in epoch 2, step 3"):
        run(dataset, path)
    state = checkpoint.load(path)
    assert (state.epoch, state.step) == (1, 0)
    assert all(weight.isfinite().all() for weight in state.model.values())


def test_the_first_bad_step_is_named_though_it_is_looked_for_later(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "REPORT_SECONDS", 1e9)
    # AdamW's step is about the learning rate: the weights overflow in the first one.
    monkeypatch.setattr(recipe_module, "LARGEST_LR", 1e30)
    with pytest.raises(NonFinite, match=r"in epoch 1, step 2$"):
        run(dataset, tmp_path / "checkpoint.pt", Recipe(**{**vars(RECIPE), "lr": 1e30, "weight_decay": 0.0}))


def test_weights_that_are_not_finite_are_not_saved(dataset, tmp_path, monkeypatch):
    """The last step's loss is finite, but its update is not."""
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "REPORT_SECONDS", 1e9)
    original = torch.optim.AdamW.step
    calls = 0

    def overflow(self):
        nonlocal calls
        calls += 1
        original(self)
        if calls == 4:
            self.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(NonFinite, match="a weight is not finite in epoch 1, after step 4"):
        run(dataset, path)
    assert checkpoint.load(path).step == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: Dataset(d.train, d.test, ("a", "b", "c"), ""), "another classes than the checkpoint"),
        (lambda d: Dataset(d.train.subset(torch.arange(90)), d.test, d.classes, ""), "number of training images"),
        (
            lambda d: Dataset(*(ImageSet(x.images[..., :6], x.labels) for x in (d.train, d.test)), d.classes, ""),
            "another image size",
        ),
        (
            lambda d: Dataset(ImageSet(d.train.images, d.train.labels.flip(0)), d.test, d.classes, ""),
            "another checksum of pixels and labels",
        ),
        (
            lambda d: Dataset(d.train, ImageSet(d.test.images ^ 1, d.test.labels), d.classes, ""),
            "another checksum of pixels and labels",
        ),
    ],
    ids=["classes", "count", "size", "labels", "pixels"],
)
def test_other_data_is_refused(dataset, tmp_path, change, message):
    path = tmp_path / "checkpoint.pt"
    state = run(dataset, path)
    with pytest.raises(CheckpointError, match=message):
        run(change(dataset), path, resumed=state)


def test_a_state_that_does_not_fit_is_refused(dataset, tmp_path):
    state = run(dataset, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"does not fit its own recipe \(.*stem.weight") as caught:
        run(dataset, tmp_path / "other.pt", Recipe(**{**vars(RECIPE), "width": 6}), resumed=state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected 1 to 100,000"),
        ({"batch_size": -1}, "batch_size is -1; expected 1 to 1,000,000"),
        ({"batch_size": 2**63}, "batch_size is 9223.*; expected an integer"),
        ({"width": 10**9}, "width is 1000000000; expected 1 to 10,000"),
        ({"depth": 200_000}, "depth is 200000; expected 1 to 200"),
        ({"depth": 2.0}, "depth is 2.0; expected an integer"),
        ({"width": True}, "width is True; expected an integer"),
        ({"limit": 0}, "limit is 0; expected 1 to"),
        ({"lr": 0.0}, "lr is 0.0; expected a positive number"),
        ({"lr": 1.5}, "lr is 1.5; expected a positive number, at most 1"),
        ({"lr": math.nan}, "lr is nan; expected a finite number"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; expected 0 to 1000"),
        ({"weight_decay": 3.0, "lr": 0.5}, "weight_decay is 3.0; expected 0 to 2, one divided by the lr"),
        ({"seed": -1}, "seed is -1; expected 0 to"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected one of fp32, bf16"),
        ({"norm": "batch"}, "norm is 'batch'; expected one of tensor, sample, channel"),
        ({"crop": -1}, "crop is -1; expected 0 to 4,096"),
        ({"cutout": -1}, "cutout is -1; expected 0 to 4,096"),
        ({"flip": 1}, "flip is 1; expected True or False"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; expected at least 0 and less than 1"),
        ({"warmup": -0.1}, "warmup is -0.1; expected at least 0 and less than 1"),
        ({"ema": math.inf}, "ema is inf; expected a finite number"),
    ],
)
def test_recipes_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, [3, 6, 8], "patch is 4, for images of 6 x 8 pixels; expected at most 3"),
        ({}, [3, 1, 8], "images of 1 x 8 pixels; expected 2 to 4,096 on each side"),
        ({}, [3, 8, 5000], "images of 8 x 5000 pixels; expected 2 to 4,096 on each side"),
        ({"crop": 16}, [3, 20, 15], "crop is 16, for images of 20 x 15 pixels; expected at most 15"),
        ({"cutout": 16}, [3, 15, 20], "cutout is 16, for images of 15 x 20 pixels; expected at most 15"),
    ],
)
def test_images_that_do_not_fit_the_model(options, size, message):
    with pytest.raises(ValueError, match=message):
        make_model(Recipe(**options), size, 10)


def test_the_memory_of_a_model_is_counted_before_it_is_taken():
    # By hand: 5 blocks of 7x7 taps, 4 outputs per channel, and two products, at both widths; stem and ends.
    assert sum(p.numel() for p in recipe_module.shape_of_model(Recipe(), [3, 32, 32], 10).parameters()) == 235_434
    # 128 images of 8 x 8 pixels after the stem, then 4 x 4, in float32.
    assert memory.activations(Recipe(), [3, 32, 32], 128) == 4 * 128 * 5 * (128 * 64 + 256 * 16)
    memory.check(Recipe(), [3, 32, 32], 10, 50_000, CPU)
    with pytest.raises(
        ValueError, match=r"a model of 10,[\d,]+ parameters, .* takes at least [\d,.]+ GiB; cpu has"
    ):
        memory.check(Recipe(width=10_000, depth=4, batch_size=10**6), [3, 32, 32], 10, 10**9, CPU)


def test_an_evaluation_that_is_not_finite(dataset, tmp_path):
    path = tmp_path / "checkpoint.pt"

    class Overflow(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), math.nan)

    evaluating = AutogradStepper(Overflow(), None, RECIPE, Batches(dataset.test, 16))
    with pytest.raises(NonFinite, match="the loss of 33 images in evaluation is nan"):
        loss_and_accuracy(evaluating, range(33))
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_once_and_then_acts_as_before(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with loop.interruption() as interrupted:
            assert interrupted() == 0
            signal.raise_signal(number)
            assert (interrupted(), acted) == (number, [])
            signal.raise_signal(number)
            assert acted == [number]
        signal.raise_signal(number)
        assert acted == [number, number]
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored(dataset, tmp_path):
    """As Ctrl-C is for a job that a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        final = run(
            dataset, tmp_path / "a.pt", observer=Recorder((2, 1), lambda: signal.raise_signal(signal.SIGINT))
        )
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert final.epoch == RECIPE.epochs


def test_a_run_in_another_thread(dataset, tmp_path):
    """It cannot handle signals; it trains all the same."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, dataset, tmp_path / "a.pt").result().epoch == RECIPE.epochs


def test_the_environment_names_what_changes_bits():
    before = Environment("cpu", "auto", 8, 1, {"torch": "2.13", "triton": "3.6"})
    now = Environment("cpu", "reference", 2, 1, {"torch": "2.14", "triton": "3.6"})
    assert before.changes(now) == ["backend auto, now reference", "threads 8, now 2", "torch 2.13, now 2.14"]
    on_a_gpu = Environment("NVIDIA H200", "auto", 4, 1, before.versions)
    assert before.changes(on_a_gpu) == ["device cpu, now NVIDIA H200"]
    assert before.changes(before) == []


def test_the_environment_names_the_kernels_of_a_cpu(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(backends, "_native_refuses", lambda *_: "there is no C++ compiler")
    before = Environment.now(cpu)
    monkeypatch.setattr(backends, "_native_refuses", lambda *_: None)
    found = library.Library(None, "0123456789abcdef01", "g++ 12.2.0", None, True)
    monkeypatch.setattr(library, "describe", lambda: found)
    assert before.changes(Environment.now(cpu)) == ["CPU kernels none, now 0123456789abcdef"]
    with fastconv.backend("portable"):
        assert "CPU kernels" not in Environment.now(cpu).versions


@pytest.fixture
def rehearsed(monkeypatch):
    """Steps take the way through graphs, where a graph is the function itself; returns what was captured."""
    captured = []

    def capture(function, device, warm_ups, pool):
        captured.append((function.func.__name__, *function.args))
        return function

    monkeypatch.setattr(graphed, "capture", capture)
    monkeypatch.setattr(graphed, "on_side_stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(
        state_module, "graphed", lambda stepper, graph, note: graphed.GraphedStepper(stepper, note)
    )
    return captured


def test_graphs_rehearsed_give_the_same_bits(dataset, tmp_path, rehearsed, monkeypatch):
    """Captured are the second steps of each kind and size, among them the last, smaller ones."""
    recipe = Recipe(**{**vars(RECIPE), "batch_size": 15})
    final = run(dataset, tmp_path / "graphed.pt", recipe)
    assert rehearsed == [("train", 15), ("evaluate", 15), ("evaluate", 5), ("train", 5)]
    monkeypatch.undo()
    eager = run(dataset, tmp_path / "eager.pt", recipe, graph="off")
    assert_same_weights(final, eager)
    for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
        assert [each[name] for each in final.history] == [each[name] for each in eager.history]
    assert final.test == eager.test


@pytest.mark.parametrize("at", [(1, 2), (2, 3), (2, "evaluation"), (3, 5)])
def test_graphs_rehearsed_stop_and_go_on(dataset, tmp_path, rehearsed, at):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(loop.Interrupted):
        run(dataset, path, observer=Recorder(at, lambda: signal.raise_signal(signal.SIGINT)))
    resumed = run(dataset, path, resumed=checkpoint.load(path))
    assert ("train", 16) in rehearsed
    assert_same_weights(resumed, run(dataset, tmp_path / "unbroken.pt"))


def test_graphs_rehearsed_stop_at_a_loss_that_is_not_finite(dataset, tmp_path, rehearsed, monkeypatch):
    monkeypatch.setattr(recipe_module, "LARGEST_LR", 1e30)
    monkeypatch.setattr(loop, "REPORT_SECONDS", 1e9)
    with pytest.raises(NonFinite, match=r"in epoch 1, step 2$"):
        run(dataset, tmp_path / "a.pt", Recipe(**{**vars(RECIPE), "lr": 1e30, "weight_decay": 0.0}))
    assert rehearsed == [("train", 16)]


def test_a_step_that_cannot_be_captured_runs_as_it_is(dataset, tmp_path, rehearsed, monkeypatch):
    def refuse(*_, **__):
        raise graphed.CaptureError("no")

    monkeypatch.setattr(graphed, "capture", refuse)
    observer = Recorder()
    final = run(dataset, tmp_path / "graphed.pt", observer=observer)
    assert observer.notes == ["no"]
    assert_same_weights(final, run(dataset, tmp_path / "eager.pt"))


def test_without_a_gpu_auto_says_why_there_are_no_graphs(dataset, tmp_path):
    observer = Recorder()
    run(dataset, tmp_path / "a.pt", observer=observer)
    expected = "Steps are launched kernel by kernel, not as CUDA graphs: cpu has none"
    assert observer.notes == [expected]
    run(dataset, tmp_path / "b.pt", observer=(silent := Recorder()), graph="off")
    assert silent.notes == []
    with pytest.raises(ValueError, match="--graph is on, and cpu has no CUDA graphs; leave --graph out"):
        graphed.check("on", CPU)
