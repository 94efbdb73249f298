"""Several processes compute what one does: operations on parts of a batch, whole trainings, and resumed ones."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import free_port, run_python, run_ranks
from together import train

from fastconv.checking.divergence import FLOOR, MARGIN, largest_difference
from fastconv.training import checkpoint, loop
from fastconv.training.recipe import Recipe

TOGETHER = Path(__file__).with_name("together.py")
TESTS = TOGETHER.parents[1]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "training"), os.environ.get("PYTHONPATH", "")]),
    "FASTCONV_SELFTEST": "0",
    "TRITON_INTERPRET": "1",
}


def test_operations():
    run_ranks(2, TOGETHER, "numbers", timeout=300, **ENVIRONMENT)


# The last batch of an epoch has two images: with more processes some have none.
RECIPE = {"epochs": 8, "batch_size": 13, "width": 4, "depth": 1, "patch": 2, "seed": 7}
MODERN = {"norm": "sample", "crop": 1, "flip": True, "label_smoothing": 0.1, "schedule": "linear", "ema": 0.9}


def train_together(count, folder, recipe, *stop):
    """The checkpoint that so many processes leave in a folder, and the losses of their steps."""
    folder.mkdir(exist_ok=True)
    run_ranks(count, TOGETHER, "training", folder, recipe, *stop, **ENVIRONMENT)
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

    Each step changes each weight by the learning rate, however small its gradient: near 0 rounding decides.
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


@pytest.mark.parametrize(
    ("count", "name"),
    [
        (2, "lecture"),
        (2, "modern"),
        pytest.param(3, "lecture", marks=pytest.mark.slow),
        pytest.param(4, "lecture", marks=pytest.mark.slow),
    ],
)
def test_a_training_is_that_of_one_process(tmp_path, alone, count, name):
    recipe = RECIPE if name == "lecture" else RECIPE | MODERN
    assert_same_run(*train_together(count, tmp_path / "run", recipe), alone[name])


def test_resumed_by_other_numbers_of_processes_it_is_the_same_run(tmp_path, alone, report_every_step):
    folder = tmp_path / "run"
    first, losses = train_together(2, folder, RECIPE, 2, 3)
    assert (first.epoch, first.environment.processes) == (1, 2)
    second, more = train_together(3, folder, RECIPE, 5, 1)
    assert (second.epoch, second.environment.processes) == (4, 3)
    last = train(Recipe(**RECIPE), folder)
    losses = torch.cat([losses, more, last])
    assert_same_run(checkpoint.load(folder / "checkpoint.pt"), losses, alone["lecture"])


@pytest.mark.slow
def test_resumed_by_as_many_processes_it_is_the_same_to_the_last_bit(tmp_path):
    """Three, whose sums depend on their order."""
    unbroken, losses = train_together(3, tmp_path / "unbroken", RECIPE)
    _, before = train_together(3, tmp_path / "run", RECIPE, 3, 4)
    resumed, after = train_together(3, tmp_path / "run", RECIPE)
    assert torch.equal(torch.cat([before, after]), losses)
    assert torch.equal(flat(resumed), flat(unbroken))
    assert resumed.test == unbroken.test


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastconv", "train"]
SMALL = ["--batch-size", "8", "--width", "4", "--depth", "1", "--patch", "2"]


@pytest.fixture
def torchrun(folder, tmp_path):
    """Starts `fastconv train` in two processes."""
    started = []

    def start(*options):
        options = "--data", folder, "--out", tmp_path / "run", *SMALL, *options
        command = [sys.executable, *TORCHRUN, *map(str, options)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def workers_of(process):
    """The processes that torchrun has started, by their rank."""
    ranks = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        for variable in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            if variable.startswith("RANK="):
                ranks[int(variable.removeprefix("RANK="))] = int(pid)
    return ranks


def wait_for_an_epoch(process, folder):
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_all_and_the_run_goes_on(torchrun, tmp_path, killed):
    process = torchrun("--epochs", "100000")
    wait_for_an_epoch(process, tmp_path / "run")
    os.kill(workers_of(process)[killed], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert len(re.findall("fastconv: .*another rank has ended, or cannot be reached", errors)) == 1, errors
    assert "torchrun --nproc-per-node 2 -m fastconv train --out" in errors
    assert "Traceback (most recent call last):\n  File" not in errors.partition("elastic")[0]
    saved = checkpoint.load(tmp_path / "run/checkpoint.pt")
    assert saved.epoch + saved.step > 0


def test_ctrl_c_saves_once_and_says_how_to_go_on(torchrun, tmp_path):
    process = torchrun("--epochs", "100000")
    wait_for_an_epoch(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=30)
    assert printed.count("\ninterrupted ") == printed.count("go on with:\n") == 1, errors
    command = shlex.split(printed.splitlines()[-1])
    assert command[:6] == ["torchrun", "--nproc-per-node", "2", "-m", "fastconv", "train"]
    assert "fastconv:" not in errors
    saved = checkpoint.load(tmp_path / "run/checkpoint.pt")
    # Once more, by one process, from there.
    begun = saved.epoch + (saved.step > 0)
    done = run_python("-m", *command[4:], "--epochs", begun)
    assert "processes 2, now 1" in done.stdout
    assert checkpoint.load(tmp_path / "run/checkpoint.pt").epoch == begun, done.stderr


def test_an_error_is_said_once_by_who_meets_it(torchrun, tmp_path):
    """All processes meet a wrong option, and one of them a file in its way."""
    _, errors = torchrun("--patch", "9").communicate(timeout=60)
    assert errors.count("patch is 9") == 1, errors
    _, errors = torchrun("--patch", "x").communicate(timeout=60)
    assert errors.count("Usage: ") == 1, errors
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").touch()
    _, errors = torchrun().communicate(timeout=60)
    assert errors.count("holds a run; go on with it by --resume") == errors.count("fastconv: ") == 1, errors


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'; expected a number, as torchrun sets it"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK is 5, of 2 processes; expected less than WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": None}, "2 processes cannot find each other"),
    ],
)
def test_wrong_environments_are_clear_errors(monkeypatch, run, environment, message):
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    code, _, errors = run("train", *SMALL)
    assert (code, message in errors) == (2, True), errors


def test_a_sweep_is_for_one_process(monkeypatch, run):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = run("sweep", "--width", "4")
    assert (code, "several processes were started" in " ".join(errors.split())) == (2, True), errors


def test_a_process_that_waits_for_others_can_be_ended(tmp_path):
    command = [sys.executable, "-m", "fastconv", "train", "--out", str(tmp_path / "run")]
    others = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(command, env=os.environ | others, stderr=subprocess.DEVNULL)
    time.sleep(6)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM
