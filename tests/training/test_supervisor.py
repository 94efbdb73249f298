"""What the main process of a sweep does when workers finish, fail, die and are stopped."""

import multiprocessing
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import stub_worker

from fastconv.training.sweep import supervisor


class Recorder(supervisor.Observer):
    def __init__(self):
        self.events, self.notes = [], []
        self.workers = []

    def begun(self, name, device):
        self.events.append(("begun", name))
        self.workers = multiprocessing.active_children()

    def progress(self, name, part):
        self.events.append((part, name))

    def note(self, text):
        self.notes.append(text)

    def finished(self, name):
        self.events.append(("finished", name))

    def failed(self, name, reason):
        self.events.append((reason, name))


@pytest.fixture
def supervise(monkeypatch, tmp_path):
    """Do runs on workers with such faults; return the signal that stopped them, and what was observed."""
    monkeypatch.setattr(supervisor, "work", stub_worker.work)
    # To receive the true one, a process imports torch.
    monkeypatch.setattr(supervisor, "Task", lambda *parts: parts)
    recorder = Recorder()

    def call(runs, faults):
        workers = [SimpleNamespace(device=f"cuda:{i}", fault=fault) for i, fault in enumerate(faults)]
        stopped = supervisor.Supervisor(tmp_path, runs, workers, recorder).run()
        assert multiprocessing.active_children() == []
        return stopped, recorder

    return call


def test_a_run_that_fails_or_whose_worker_is_killed_does_not_stop_the_others(supervise):
    runs = {"a": "fails", "b": "works", "c": "is killed", "d": "works"}
    stopped, seen = supervise(runs, [None])
    assert stopped == 0
    assert seen.events == [
        *[("begun", "a"), (0.5, "a"), ("why", "a")],
        *[("begun", "b"), (0.5, "b"), ("finished", "b")],
        *[("begun", "c"), ("its worker was killed by SIGKILL", "c")],
        *[("begun", "d"), (0.5, "d"), ("finished", "d")],
    ]


def test_workers_that_get_not_ready_leave_their_share_to_the_others(supervise):
    _, seen = supervise(dict.fromkeys("abc", "works"), ["refuses", None, "crashes"])
    assert sorted(name for event, name in seen.events if event == "finished") == ["a", "b", "c"]
    assert sorted(seen.notes) == [
        "There is no worker on cuda:0: no such backend",
        "There is no worker on cuda:2: it ended with exit code 3 before it was ready",
    ]


def test_without_a_worker_all_runs_fail(supervise):
    _, seen = supervise({"a": "works", "b": "works"}, ["refuses"])
    assert seen.events == [("there is no worker left", "a"), ("there is no worker left", "b")]


def test_a_signal_stops_all_workers(supervise, monkeypatch):
    begun = Recorder.begun

    def stop(self, name, device):
        begun(self, name, device)
        # As the second run begins.
        if len(self.events) == 2:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(Recorder, "begun", stop)
    stopped, seen = supervise(dict.fromkeys("abc", "never ends"), [None, None])
    assert stopped == signal.SIGTERM
    assert sorted(seen.events) == [("begun", "a"), ("begun", "b")]


def test_an_error_of_the_main_process_leaves_no_worker_behind(supervise, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(Recorder, "progress", fail)
    with pytest.raises(OSError, match="no space"):
        supervise({"a": "works", "b": "never ends"}, [None, None])
    assert multiprocessing.active_children() == []
