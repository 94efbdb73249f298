"""What TensorBoard's own reader finds in the event files of a run."""

import math

import pytest
from synthetic import CPU, RECIPE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastconv.training import checkpoint, loop, runs
from fastconv.training.recipe import Recipe
from fastconv.training.schedule import rates


class Stop(Exception):
    pass


class Stopper(loop.Observer):
    """Stops in the second epoch, after its third step."""

    def step(self, epoch, step, *_):
        if (epoch, step) == (2, 3):
            raise Stop


def go_on(dataset, recipe, out, observer, resumed=None):
    state = loop.prepare(recipe, dataset, CPU, resumed)
    return runs.go_on(state, out, resumed, observer, tensorboard=True)


@pytest.mark.usefixtures("report_every_step")
def test_events_are_the_runs_metrics_once_each_also_after_a_stop(dataset, tmp_path, monkeypatch):
    recipe = Recipe(**{**vars(RECIPE), "schedule": "linear", "warmup": 0.2})
    steps = math.ceil(80 / recipe.batch_size)
    # It is saved after every step, and has written a step more than it has saved.
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    with pytest.raises(Stop):
        go_on(dataset, recipe, tmp_path, Stopper())
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert (saved.epoch, saved.step) == (1, 2)
    final = go_on(dataset, recipe, tmp_path, loop.Observer(), saved)

    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()

    def values(tag):
        return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]

    for name in ("train", "validation"):
        for quantity in ("loss", "accuracy"):
            expected = [(m["epoch"] * steps, m[f"{name}_{quantity}"]) for m in final.history]
            assert expected == values(f"{quantity}/{name}")
    for name in ("seconds", "evaluation_seconds"):
        assert [(m["epoch"] * steps, m[name]) for m in final.history] == values(f"time/{name}")
    assert [(3 * steps, final.test["test_accuracy"])] == values("accuracy/test")
    assert [(3 * steps, final.test["test_loss"])] == values("loss/test")
    expected = [rate for epoch in range(3) for rate in rates(recipe, epoch, steps).tolist()]
    assert list(enumerate(expected)) == values("step/learning_rate")
    losses = [event.value for event in events.Scalars("step/loss")]
    assert len(losses) == 3 * steps
    assert losses[steps : steps + 2] == saved.losses.tolist()


def test_without_the_option_there_are_no_events(dataset, tmp_path):
    runs.go_on(loop.prepare(RECIPE, dataset, CPU, None), tmp_path, None, loop.Observer())
    assert not list(tmp_path.glob("events*"))
