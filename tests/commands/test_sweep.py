"""`fastconv sweep` and `fastconv compare`, as a user types them, on a small image folder."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from refusal import refused

import fastconv
from fastconv.commands import main, sweep
from fastconv.console import console
from fastconv.files import WriteError
from fastconv.training import checkpoint, data, loop
from fastconv.training.comparison import files
from fastconv.training.folder import FILES, LOCK
from fastconv.training.recipe import Recipe
from fastconv.training.sweep import plan

SMALL = ["--batch-size", "8", "--depth", "1", "--patch", "2", "--backend", "portable"]
SWEEP_FILES = ["sweep-curves.png", "sweep.csv", "sweep.json", "sweep.md", "sweep.png"]
NAMES = [f"width-{width}_seed-{seed}" for seed in (0, 1) for width in (4, 6)]


@pytest.fixture(autouse=True)
def _one_thread():
    """The workers' number of threads is that of the runs which they are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(folder, path, **options):
    """The checkpoint of a run that nothing stops, by the loop itself."""
    recipe = Recipe(batch_size=8, depth=1, patch=2, train_metrics="running", **options)
    with fastconv.backend("portable"):
        return loop.train(recipe, data.load(folder), torch.device("cpu"), path, loop.Observer(), None)


def assert_same_run(found, expected):
    assert found.recipe == expected.recipe
    assert all(torch.equal(found.model[name], weight) for name, weight in expected.model.items())
    assert found.test == expected.test


@pytest.fixture(scope="module")
def swept(folder, tmp_path_factory):
    """The folder of a sweep on two workers, its exit code, and what it printed."""
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    options = ["--width", "4,6", "--seeds", "2", "--epochs", "2", "--device", "cpu,cpu", "--json", *SMALL]
    arguments = ["fastconv", "sweep", "--data", str(folder), "--out", str(out), *options, "--tensorboard"]
    printed, shown = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, fastconv.backend("auto"):
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped, redirect_stdout(printed), redirect_stderr(shown):
            main.main()
    return out, stopped.value.code or 0, printed.getvalue(), shown.getvalue()


def test_each_run_of_a_sweep_is_one_of_train(swept, folder, run, tmp_path):
    out, code, printed, shown = swept
    assert code == 0, shown
    assert sorted(os.listdir(out)) == sorted([LOCK, *SWEEP_FILES, *NAMES])
    lines = {line["run"]: line for line in map(json.loads, printed.splitlines())}
    assert sorted(lines) == sorted(NAMES)
    for name in NAMES:
        state = checkpoint.load(out / name / "checkpoint.pt")
        assert lines[name]["test_accuracy"] == state.test["test_accuracy"]
        accuracy = 100 * state.history[-1]["validation_accuracy"]
        assert re.search(rf"[1-4]/4 {name}: validation {accuracy:.2f} %, test ", shown)
        files = sorted(each for each in os.listdir(out / name) if not each.startswith("events"))
        assert files == [LOCK, *sorted(FILES)]
        assert list((out / name).glob("events.out.tfevents.*"))
    expected = trained(folder, tmp_path / "checkpoint.pt", width=6, seed=1, epochs=2)
    assert_same_run(state, expected)
    assert run("evaluate", "--checkpoint", out / NAMES[0] / "checkpoint.pt")[0] == 0


def test_a_sweep_ends_in_the_table_of_compare(swept, run, tmp_path):
    out, _, _, shown = swept
    code, printed, _ = run("compare", out, "--out", tmp_path / "comparison")
    assert code == 0
    table = [line.split() for line in printed.splitlines() if line.startswith("width")]
    assert [line[:3] for line in table] == [["width", "4", f"{count(4):,}"], ["width", "6", f"{count(6):,}"]]
    assert [line[-1] for line in table] == ["2", "2"]
    for line in table:
        assert line in [each.split() for each in shown.splitlines()]
    assert "the lecture" not in printed
    assert (tmp_path / "comparison/compare.md").read_text().splitlines()[:4] == (
        out / "sweep.md"
    ).read_text().splitlines()[:4]
    with open(tmp_path / "comparison/compare.csv", newline="") as file:
        assert sorted(line["run"] for line in csv.DictReader(file)) == sorted(str(out / name) for name in NAMES)
    refused(run("compare", out, "--out", tmp_path / "comparison"), r"holds compare\.md, .*; give another --out")


def count(width):
    """The parameters of the model: stem, downsampling and head; and the block of each stage."""
    ends = width * (3 * 4 + 1) + 2 * width * (4 * width + 1) + 2 * (2 * width + 1)
    return ends + sum(4 * c * (49 + 1) + c * (4 * c + 1) + c * (c + 1) for c in (width, 2 * width))


def test_compare_writes_into_a_new_folder_of_its_own(swept, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("compare", swept[0] / NAMES[0], swept[0] / NAMES[1] / "checkpoint.pt")[0] == 0
    (written,) = (tmp_path / "runs").iterdir()
    assert written.name.startswith("compare-2")
    assert sorted(os.listdir(written)) == ["compare-curves.png", "compare.csv", "compare.md", "compare.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "32,x"], "width is '32,x'; expected integers, separated by commas: 'x' is none"),
        (["--width", "4,100000", "--seeds", "2"], "width 100000, seed 0: width is 100000; expected 1 to 10,000"),
        (
            ["--patch", "2,20", "--width", "4"],
            "patch-20: patch is 20, for images of 8 x 8 pixels; expected at most",
        ),
        (["--width", "4,10000", "--depth", "200", "--patch", "1"], "width-10000: a model of .* takes at least"),
        (["--patch", "5"], "Invalid value: patch is 5, for images of 8 x 8 pixels"),
        (["--patch", "40", "--whiten", "on"], "patch is 40, too large for whiten; expected at most 32"),
        (["--seeds", "10000000000"], "--seeds.*less than or equal to 1000"),
        (["--seed", "0,1", "--seeds", "2"], "got both --seed and --seeds; give one of them"),
        (["--device", "cpu,tpu"], "device is 'tpu'; expected auto, "),
        (["--graph", "on"], "--graph is on, and cpu has no CUDA graphs"),
        (["--recipe", "old"], "recipe is 'old'; expected some of lecture, modern"),
        (["--resume"], "--resume goes on with the sweep in a directory; name it with --out"),
        (
            ["--resume", "--out", "nowhere"],
            r"nowhere/sweep\.json is not a file; give with --out the folder of a sweep",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_is_written(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    refused(run("sweep", "--data", folder, *arguments), message)
    assert os.listdir(tmp_path) == []


def test_images_too_few_to_validate_on_are_refused_before_anything_is_written(run, folder, tmp_path):
    for split in ("train", "test"):
        for name in ("bright", "dark"):
            (tmp_path / "few" / split / name).mkdir(parents=True)
            shutil.copy(folder / split / name / "0.png", tmp_path / "few" / split / name)
    result = run("sweep", "--data", tmp_path / "few", "--out", tmp_path / "out", *SMALL)
    refused(result, "few: 2 training images leave none to validate on")
    assert not (tmp_path / "out").exists()


def test_tensorboard_that_is_not_installed_is_named_before_anything_is_written(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for command in ("train", "sweep"):
        result = run(command, "--data", folder, "--out", tmp_path / "out", "--tensorboard")
        refused(result, r'cannot be imported .* install it with: pip install "fastconv\[tensorboard\]"')
    assert os.listdir(tmp_path) == []


def test_a_sweep_does_not_replace_another_or_change(run, swept, folder, other_pixels):
    out = swept[0]
    before = (out / "sweep.json").read_bytes()
    refused(run("sweep", "--data", folder, "--out", out), "holds a sweep; go on with it by --resume, or give")
    message = "the sweep has its runs, with which it goes on; leave --width out"
    refused(run("sweep", "--out", out, "--resume", "--width", "4"), message)
    refused(run("sweep", "--out", out, "--resume", "--seeds", "3"), "leave --seeds out")
    message = f"on other pixels or labels; give with --data what it was trained on, then in {folder}"
    refused(run("sweep", "--out", out, "--resume", "--data", other_pixels), message)
    refused(run("train", "--data", folder, "--out", out), "holds a sweep; give another --out")
    refused(run("sweep", "--data", folder, "--out", out / NAMES[0]), "holds a run; give another --out")
    assert (out / "sweep.json").read_bytes() == before
    refused(run("compare", folder), "holds no run; give the folder of a run or of a sweep")
    refused(run("compare", ""), "it is empty; give a path")
    refused(run("compare", "nowhere"), "nowhere is not a file; give the checkpoint.pt of a training run")


def wait_until(condition):
    ended = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < ended
        time.sleep(0.01)


def worker_of(run):
    """The process that holds a run, or that did before it was killed."""
    owner = run / ".fastconv.owner"
    return int(owner.read_text().split()[1]) if owner.exists() else None


def is_alive(number):
    try:
        # In a container nobody may wait for a process whose parent was killed.
        return "State:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except FileNotFoundError:
        return False


def test_after_a_table_that_cannot_be_written_the_sweep_can_go_on(swept, run, monkeypatch):
    def full(path, write):
        raise WriteError(f"{path} cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        code, printed, err = run("sweep", "--out", swept[0], "--resume")
    assert (code, err) == (2, f"fastconv: {swept[0] / 'sweep.md'} cannot be written\n")
    again = printed.splitlines()[-1]
    assert again == f"  fastconv sweep --out {swept[0]} --resume"
    assert run(*shlex.split(again)[1:])[0] == 0


def test_a_sweeps_help_names_the_values_of_an_option(run):
    shown = re.sub(r"[│\s]+", " ", run("sweep", "--help")[1])
    assert "one pixel. [tensor, sample, channel; default: tensor; modern: sample]" in shown
    assert "Mirror training images at random. [on, off; default: off; modern: on]" in shown


def test_a_run_of_another_recipe_is_not_the_one_of_that_name(swept, tmp_path):
    recipes = plan.load(swept[0]).runs
    first, second, *_ = recipes
    assert sweep.is_done(swept[0] / first, recipes[first])
    shutil.copytree(swept[0] / second, tmp_path / first)
    shutil.copytree(swept[0] / second, tmp_path / second)
    assert not sweep.is_done(tmp_path / first, recipes[first])
    shown = io.StringIO()
    sweep.show_results(console(file=shown), tmp_path, recipes, {})
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert [line["run"] for line in csv.DictReader(lines)] == [str(tmp_path / second)]


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_runs_and_data_may_have_any_name(swept, folder, run, tmp_path):
    name = os.fsdecode(b"a|b\n$x_{$ \xe6\xbc\xa2 \xff")
    shutil.copytree(folder, tmp_path / name)
    options = ["--data", tmp_path / name, "--out", tmp_path / "runs" / name, "--width", "4", *SMALL]
    assert run("train", *options)[0] == 0
    code, printed, err = run("compare", tmp_path / "runs" / name, "--out", tmp_path / "compare")
    assert (code, err) == (0, "")
    escaped = r"a|b\n$x_{$ 漢 \udcff"
    assert f"images of {tmp_path}/{escaped}." in printed
    with open(tmp_path / "compare/compare.csv", newline="") as file:
        assert next(csv.DictReader(file))["run"] == f"{tmp_path}/runs/{escaped}"
    refused(run("compare", tmp_path / name / "none"), re.escape(escaped))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_killed_and_interrupted_a_sweep_goes_on_to_the_same_weights(folder, tmp_path, run):
    """Beside a run that fails."""
    out = tmp_path / "a sweep"
    names = ["width-4", "width-6"]
    first = out / names[0]
    options = ["--data", folder, "--width", "4,6", "--epochs", "30", *SMALL]
    command = [sys.executable, "-m", "fastconv", "sweep", "--out", out, *options]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    wait_until(lambda: (first / "metrics.jsonl").exists())
    worker = worker_of(first)
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(worker))
    saved = checkpoint.load(first / "checkpoint.pt")
    assert 0 < saved.epoch < 30

    def interrupt():
        wait_until(lambda: worker_of(first) not in (worker, None))
        interrupted.append(worker_of(first))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    interrupted = []
    threading.Thread(target=interrupt).start()
    # Whatever the shell has set.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code, printed, _ = run("sweep", "--out", out, "--resume", "--backend", "portable")
    assert code == 130
    assert not is_alive(interrupted[0])
    again = shlex.split(printed.splitlines()[-1])
    assert again == ["fastconv", "sweep", "--out", str(out), "--resume", "--backend", "portable"]
    assert "of 30 epochs done" in (out / "sweep.md").read_text()
    assert not (out / names[1]).exists()

    damaged = out / names[1] / "checkpoint.pt"
    damaged.parent.mkdir()
    damaged.write_bytes(b"not a checkpoint")
    code, printed, _ = run(*again[1:])
    assert code == 1
    assert f"2/2 {names[1]}: failed: {damaged} is damaged or not a checkpoint" in printed
    assert f"train again: move {damaged.parent} away, and resume the sweep\n" in printed
    assert f"1 failed; try them again with:\n  {shlex.join(again)}\n" in printed
    assert f"{names[1]} failed: {damaged} is damaged" in (out / "sweep.md").read_text()
    expected = trained(folder, tmp_path / "unbroken.pt", width=4, epochs=30)
    assert_same_run(checkpoint.load(first / "checkpoint.pt"), expected)
    assert len((first / "metrics.jsonl").read_text().splitlines()) == 30
    assert sorted(os.listdir(out)) == sorted([LOCK, *SWEEP_FILES, *names])
