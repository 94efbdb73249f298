"""What a worker of a sweep does with the runs that it is handed; in this process."""

import multiprocessing
from dataclasses import replace

import pytest
import torch
from synthetic import CPU, RECIPE, assert_same_weights, run

import fastconv
from fastconv.training import checkpoint, data, loop
from fastconv.training.folder import FILES
from fastconv.training.sweep import worker
from fastconv.training.sweep.worker import Settings, Task


@pytest.fixture
def work(dataset, monkeypatch):
    """Hand tasks to a worker; return its reports but for notes, those of progress apart."""
    monkeypatch.setattr(worker, "_stop_with_the_main_process", lambda: None)
    monkeypatch.setattr(data, "load", lambda directory: dataset)

    def call(*tasks, checksum=dataset.checksum):
        ours, theirs = multiprocessing.Pipe()
        for task in (*tasks, None):
            ours.send(task)
        settings = Settings("cpu", "portable", "auto", False, torch.get_num_threads(), None, checksum)
        worker.work(theirs, settings)
        reports = []
        while ours.poll():
            reports.append(ours.recv())
        parts = [report.part for report in reports if report.kind == "progress"]
        return [report for report in reports if report.kind not in ("progress", "note")], parts

    # What the worker forces ends with the test.
    with fastconv.backend("portable"):
        yield call


def test_runs_are_done_resumed_and_reported(work, dataset, tmp_path):
    unbroken = run(dataset, tmp_path / "unbroken.pt")

    class Stop(Exception):
        pass

    class Stopper(loop.Observer):
        def epoch(self, history):
            raise Stop

    (tmp_path / "begun").mkdir()
    with pytest.raises(Stop):
        loop.train(RECIPE, dataset, CPU, tmp_path / "begun/checkpoint.pt", Stopper(), None)
    reports, parts = work(Task(tmp_path / "new", RECIPE), Task(tmp_path / "begun", RECIPE))
    assert [report.kind for report in reports] == ["ready", "finished", "ready", "finished", "ready"]
    # From its start, and from its checkpoint.
    assert parts.count(0.0) == 1
    again = parts.index(1.0, parts.index(1.0) + 1)
    assert min(parts[again:]) >= 1 / 3
    for name in ("new", "begun"):
        assert_same_weights(checkpoint.load(tmp_path / name / "checkpoint.pt"), unbroken)
        assert all((tmp_path / name / file).exists() for file in FILES)


def test_a_loss_that_is_not_finite_fails_one_run(work, tmp_path, monkeypatch):
    monkeypatch.setattr("fastconv.training.recipe.LARGEST_LR", 1e30)
    wild = replace(RECIPE, lr=1e30, weight_decay=0.0)
    reports, _ = work(Task(tmp_path / "wild", wild), Task(tmp_path / "tame", RECIPE))
    assert [report.kind for report in reports] == ["ready", "failed", "ready", "finished", "ready"]
    assert reports[1].text.endswith("in epoch 1, step 2")


def damage(folder):
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"not a checkpoint")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; give a smaller --batch-size"),
        (KeyError("a fault\nof ours"), r"KeyError: 'a fault\nof ours'"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_after_other_failures_a_worker_ends(work, tmp_path, monkeypatch, capsys, error, text):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop.State, "evaluate", fail)
    reports, _ = work(Task(tmp_path / "a", RECIPE), Task(tmp_path / "b", RECIPE))
    assert [report.kind for report in reports] == ["ready", "failed"]
    assert reports[1].text.startswith(text)
    # A traceback is for what nobody expected.
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)


def test_a_folder_with_something_else_fails(work, tmp_path):
    damage(tmp_path / "damaged")
    (report,) = [each for each in work(Task(tmp_path / "damaged", RECIPE))[0] if each.kind == "failed"]
    assert "is damaged or not a checkpoint" in report.text
    work(Task(tmp_path / "run", RECIPE))
    reports, _ = work(Task(tmp_path / "run", replace(RECIPE, lr=0.5)))
    assert reports[1].text == f"{tmp_path}/run holds a run of another recipe; move it out of the sweep"


def test_data_that_has_changed_is_refused(work, tmp_path):
    reports, _ = work(Task(tmp_path / "run", RECIPE), checksum="0" * 64)
    assert [report.kind for report in reports] == ["failed"]
    assert "has changed since the sweep began" in reports[0].text
    assert not (tmp_path / "run").exists()
