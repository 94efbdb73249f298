"""How much of a sweep is done and what is left, with a clock of the test's."""

import io

import pytest

from fastconv.console import console
from fastconv.training.sweep import display
from fastconv.training.sweep.display import Display, Estimate

# "b" was finished by another process.
WORK = {"a": 100.0, "b": 500.0, "c": 300.0, "d": 100.0}


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_what_is_left_is_estimated_from_the_work_done_here(clock):
    estimate = Estimate(WORK, ["b"])
    assert (estimate.part, estimate.left()) == (0.5, "")
    # Workers start meanwhile.
    clock[0] += 60
    # It begins in its middle.
    estimate.update("c", 0.5)
    assert (estimate.part, estimate.left()) == (0.65, "")
    clock[0] += 20
    estimate.update("c", 0.6)
    assert estimate.part == pytest.approx(0.68)
    # 30 in 20 s; 320 are left.
    assert estimate.left() == "about 4 min left"
    estimate.drop("a")
    estimate.update("c", 1.0)
    clock[0] += 4
    # 150 in 24 s; 100 are left.
    assert estimate.left() == "about 16 s left"
    estimate.update("d", 1.0)
    assert (estimate.part, estimate.left()) == (1.0, "")


def test_the_lines_of_a_sweep(tmp_path, clock, capsys):
    file = io.StringIO()
    shown = Display(console(file=file, width=80), tmp_path, WORK, ["b"], json_output=True)
    for name in ("a", "c"):
        shown.begun(name, "cpu")
        shown.note("Something all runs say")
    shown.progress("a", 0.0)
    shown.progress("c", 0.0)
    clock[0] += 3600
    shown.progress("c", 0.5)
    shown.failed("a", "the loss is nan in epoch 1, step 2")
    assert file.getvalue() == (
        "Something all runs say\n2/4 a: failed: the loss is nan in epoch 1, step 2; about 1.7 h left\n"
    )
    assert capsys.readouterr().out == '{"run": "a", "failed": "the loss is nan in epoch 1, step 2"}\n'
    assert shown.failures == {"a": "the loss is nan in epoch 1, step 2"}


def test_a_run_that_was_removed_as_it_ended_has_failed(tmp_path):
    file = io.StringIO()
    shown = Display(console(file=file, width=500), tmp_path, {"a": 1.0, "b": 1.0}, [], json_output=False)
    shown.begun("a", "cpu")
    shown.progress("a", 0.5)
    shown.finished("a")
    reason = f"{tmp_path / 'a' / 'checkpoint.pt'} is not a file; give the checkpoint.pt of a training run"
    assert shown.failures == {"a": reason}
    assert file.getvalue().startswith(f"1/2 a: failed: {reason}")
