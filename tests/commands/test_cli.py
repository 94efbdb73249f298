"""The commands, as a user types them, on a small image folder."""

import dataclasses
import errno
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_python
from refusal import refused

import fastconv
from fastconv import machine
from fastconv.commands import main
from fastconv.graphs import CaptureError
from fastconv.kernels.cpu import library
from fastconv.kernels.cpu.library import Library
from fastconv.operations import backends
from fastconv.training import checkpoint, data, loop, prediction
from fastconv.training import folder as run_folder
from fastconv.training.folder import FILES, LOCK
from fastconv.training.recipe import RECIPES, Recipe

SMALL = ["--epochs", "2", "--batch-size", "8", "--width", "4", "--depth", "1", "--patch", "2"]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The directory of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["fastconv", "train", "--data", str(folder), "--out", str(out), *SMALL]
    with pytest.MonkeyPatch.context() as patch, fastconv.backend("auto"):
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            main.main()
    assert not stopped.value.code
    return out


def test_train_saves_and_reports(run, folder, tmp_path):
    code, out, err = run("train", "--data", folder, "--out", tmp_path / "run", *SMALL)
    assert (code, err) == (0, "")
    assert sorted(os.listdir(tmp_path / "run")) == [LOCK, *sorted(FILES)]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2]
    for m in metrics:
        lines = [
            rf"training: +loss {m['train_loss']:.4f}, accuracy {100 * m['train_accuracy']:.2f} %",
            rf"validation: +loss {m['validation_loss']:.4f}, accuracy {100 * m['validation_accuracy']:.2f} %",
        ]
        assert re.search(rf"Epoch {m['epoch']}/2 +" + r"\s+".join(lines), out)
    test = checkpoint.load(tmp_path / "run/checkpoint.pt").test
    assert f"loss {test['test_loss']:.4f}, accuracy {100 * test['test_accuracy']:.2f} %" in out
    assert "image folder" in out
    assert "ConvNextBlock" in out
    assert re.search(r"2 epochs in 0 min \d\d\.\d s, of which evaluations took \d+\.\d s\n", out)
    assert {m["train_metrics"] for m in metrics} == {"evaluated"}
    assert "Steps are launched kernel by kernel, not as CUDA graphs: cpu has none\n" in out
    assert "\x1b" not in out, "control codes in what is not a terminal"
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["recipe"] == {
        "epochs": 2,
        "batch_size": 8,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "width": 4,
        "depth": 1,
        "patch": 2,
        "seed": 0,
        "split_seed": 55,
        "precision": "fp32",
        "norm": "tensor",
        "whiten": False,
        "crop": 0,
        "flip": False,
        "cutout": 0,
        "label_smoothing": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "decay": "all",
        "ema": 0.0,
        "train_metrics": "evaluated",
        "limit": None,
    }
    assert config["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (config["data_directory"], config["train_images"]) == (str(folder), 16)
    assert config["data_checksum"] == data.load(folder).checksum
    assert (config["device"], config["threads"]) == ("cpu", torch.get_num_threads())
    with Image.open(tmp_path / "run/curves.png") as picture:
        assert min(picture.size) > 300


def test_train_json(run, folder, tmp_path):
    code, out, err = run("train", "--data", folder, "--out", tmp_path / "run", "--json", *SMALL)
    assert code == 0
    *epochs, final = [json.loads(line) for line in out.splitlines()]
    written = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert epochs == [json.loads(line) for line in written]
    assert final["directory"] == str(tmp_path / "run")
    assert 0 <= final["test_accuracy"] <= 1
    assert "Epoch 2/2" in err


def test_running_metrics_say_that_they_are(run, folder, tmp_path):
    options = ["--train-metrics", "running", "--graph", "off"]
    code, out, _ = run("train", "--data", folder, "--out", tmp_path / "run", *SMALL, *options)
    assert code == 0
    assert len(re.findall(r"training: .* %, running\n", out)) == 2
    assert not re.search(r"validation: .*running", out)
    assert "CUDA graphs" not in out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["train_metrics"] for line in lines} == {"running"}


def test_graphs_are_refused_where_there_are_none(run, folder, tmp_path):
    result = run("train", "--data", folder, "--out", tmp_path / "run", "--graph", "on", *SMALL)
    refused(result, "--graph is on, and cpu has no CUDA graphs; leave --graph out")
    assert not (tmp_path / "run").exists()


def test_the_default_directory_is_new_for_each_run(run, folder, tmp_path, monkeypatch):
    """Also for those that start in one second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260102-030405")
    (tmp_path / "runs/20260102-030405-2").mkdir(parents=True)
    for name in ("20260102-030405", "20260102-030405-3"):
        assert run("train", "--data", folder, *SMALL[2:], "--epochs", 1)[0] == 0
        assert (tmp_path / "runs" / name / "checkpoint.pt").exists()
    assert os.listdir(tmp_path / "runs/20260102-030405-2") == []


@pytest.mark.parametrize("name", FILES)
def test_files_are_not_replaced_by_a_new_run(run, folder, tmp_path, name):
    (tmp_path / name).write_text("mine")
    message = "holds a run; go on with it by --resume" if name == "checkpoint.pt" else f"holds {name}, which a run"
    refused(run("train", "--data", folder, "--out", tmp_path, *SMALL), message)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_goes_on_with_its_own_data(run, folder, tmp_path, monkeypatch, other_pixels):
    """Neither other pixels nor the download cache take its place."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder.parent)
    out = tmp_path / "run"
    # Relative, as a user types it; the run is resumed from elsewhere.
    assert run("train", "--data", folder.name, "--out", out, *SMALL)[0] == 0
    monkeypatch.chdir(tmp_path)
    before = contents(out)
    message = rf"another checksum of pixels and labels .* with --data what it was trained on, then in {folder}"
    for command in (["train", "--resume", "--out", out], ["evaluate", "--checkpoint", out / "checkpoint.pt"]):
        refused(run(*command, "--data", other_pixels), message)
        assert contents(out) == before
    assert run("evaluate", "--checkpoint", out / "checkpoint.pt")[0] == 0
    code, printed, _ = run("train", "--resume", "--out", out, "--epochs", 3)
    assert code == 0
    assert f"image folder, {folder}" in printed
    after = contents(out)
    assert after[out / "config.json"] == before[out / "config.json"], "what was recorded of its start"
    assert len(after[out / "metrics.jsonl"].splitlines()) == 3

    moved = shutil.copytree(folder, tmp_path / "moved")
    assert run("train", "--resume", "--out", out, "--data", moved)[0] == 0
    shutil.rmtree(moved)
    refused(run("train", "--resume", "--out", out), rf"{moved} is not .* if it has moved, name it with --data")


def test_a_run_goes_on_with_its_number_of_threads(run, trained, tmp_path, monkeypatch):
    out = shutil.copytree(trained, tmp_path / "run")
    state = checkpoint.load(out / "checkpoint.pt")
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: threads + 1)
    try:
        for before, after in [(threads + 1, threads + 1), (threads + 2, threads)]:
            torch.set_num_threads(threads)
            versions = {**state.environment.versions, "torch": "1.0"}
            environment = dataclasses.replace(state.environment, threads=before, versions=versions)
            dataclasses.replace(state, environment=environment).save(out / "checkpoint.pt")
            code, printed, _ = run("train", "--resume", "--out", out)
            assert code == 0
            assert torch.get_num_threads() == after
            assert f"torch 1.0, now {machine.package_version('torch')}" in printed
            assert (f"threads {before}, now {after}, " in printed) == (before != after)
            assert "may differ in the last bits" in printed
            # From here on it is the run's environment.
            assert "Changed since" not in run("train", "--resume", "--out", out)[1]
    finally:
        torch.set_num_threads(threads)


def test_a_finished_run_is_shown_again(run, folder, trained):
    before = checkpoint.load(trained / "checkpoint.pt")
    code, out, _ = run("train", "--data", folder, "--out", trained, "--resume")
    assert code == 0
    assert f"accuracy {100 * before.test['test_accuracy']:.2f} %" in out
    after = checkpoint.load(trained / "checkpoint.pt")
    assert all(torch.equal(after.model[name], before.model[name]) for name in before.model)
    assert after.history == before.history


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "8"], "started with --width 4; got 8: leave --width out"),
        (["--batch-size", "128"], "started with --batch-size 8; got 128"),
        (["--epochs", "1"], "has done 2 epochs; got --epochs 1: give at least 2"),
    ],
)
def test_options_that_contradict_the_run_are_refused(run, folder, trained, options, message):
    refused(run("train", "--data", folder, "--out", trained, "--resume", *options), message)


def test_a_recipe_sets_what_is_not_typed(run, folder, tmp_path):
    out = tmp_path / "run"
    options = ["--recipe", "modern", "--no-flip", "--crop", "1", *SMALL]
    assert run("train", "--data", folder, "--out", out, *options)[0] == 0
    found = checkpoint.load(out / "checkpoint.pt").recipe
    typed = {"epochs": 2, "batch_size": 8, "width": 4, "depth": 1, "patch": 2, "flip": False, "crop": 1}
    assert found == dataclasses.replace(RECIPES["modern"], **typed)
    resume = ["train", "--out", out, "--resume"]
    assert run(*resume)[0] == 0
    refused(run(*resume, "--recipe", "modern"), "the run has its recipe, .* leave --recipe out")
    refused(run(*resume, "--crop", "2"), "the run was started with --crop 1; got 2: leave --crop out")
    refused(run(*resume, "--flip"), "the run was started with --flip off; got on: leave --flip out")
    refused(
        run(*resume, "--epochs", "3"), "learning rate has a schedule of 2 epochs; got --epochs 3: leave --epochs"
    )


def test_more_epochs_on_resume(run, folder, tmp_path):
    out = tmp_path / "run"
    assert run("train", "--data", folder, "--out", out, *SMALL)[0] == 0
    # Options that repeat the run's own are no contradiction.
    code, _, _ = run("train", "--data", folder, "--out", out, "--resume", "--epochs", 3, "--width", 4)
    assert code == 0
    assert [m["epoch"] for m in checkpoint.load(out / "checkpoint.pt").history] == [1, 2, 3]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "new"], "'new' is not one of 'lecture', 'modern'"),
        (["train", "--resume"], "--resume goes on with the run in a directory; name it with --out"),
        (["train", "--resume", "--out", "nowhere"], r"nowhere.checkpoint\.pt is not a file"),
        (["train", "--data", "nowhere"], "nowhere is not a directory; give the one that holds the data set"),
        (["train", "--epochs", "0"], "epochs is 0; expected 1 to 100,000"),
        (["train", "--lr", "nan"], "lr is nan; expected a finite number"),
        (["train", "--lr", "1e30"], r"lr is 1e\+30; expected a positive number, at most 1"),
        (["train", "--width", "100000"], "width is 100000; expected 1 to 10,000"),
        (["train", "--depth", "200000"], "depth is 200000; expected 1 to 200"),
        (["train", "--batch-size", str(2**63)], "batch_size is 9223.*; expected an integer"),
        (
            ["train", "--width", "10000", "--depth", "200", "--data", "FOLDER", "--patch", "1"],
            "takes at least .* GiB",
        ),
        (["summary", "--width", "1000000000"], "width is 1000000000; expected 1 to 10,000"),
        (["train", "--out", ""], "it is empty; give a path"),
        (["train", "--data", ""], "it is empty; give a path"),
        (["train", "--device", "tpu"], "device is 'tpu'; expected auto, "),
        (["train", "--device", "cuda:99"], "device is 'cuda:99'; this machine has .*cpu"),
        (
            ["train", "--backend", "triton"],
            "cannot run depthwise_conv_layer_norm: on a CPU it needs TRITON_INTERPRET=1",
        ),
        (["train", "--backend", "fast"], "'fast' is not one of"),
        (
            ["train", "--patch", "20", "--data", "FOLDER"],
            "patch is 20, for images of 8 x 8 pixels; expected at most 4",
        ),
        (["train", "--no-such-option"], "No such option: --no-such-option"),
        (["train", "--out", "FILE"], "--out is .*0.png, a file; give a directory"),
        (["summary", "--patch", "17"], "patch is 17, for images of 32 x 32 pixels"),
        (["evaluate", "--checkpoint", "nowhere.pt"], r"nowhere\.pt is not a file"),
        (["predict", "--checkpoint", "nowhere.pt", "image.png"], r"nowhere\.pt is not a file"),
        (["predict", "image.png"], "Missing option '--checkpoint'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    paths = {"FOLDER": folder, "FILE": folder / "train/dark/0.png"}
    refused(run(*[paths.get(a, a) for a in arguments]), message)
    assert os.listdir(tmp_path) == [], "something was left behind"


def test_a_directory_that_cannot_be_written(run, folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = "file/run cannot be made: Not a directory; give another --out"
    refused(run("train", "--data", folder, "--out", tmp_path / "file/run", *SMALL), message)


def test_a_full_disk(run, folder, tmp_path, monkeypatch):
    """The file is named, the last checkpoint is still good, and once there is room the run goes on from it."""
    calls = 0

    def fail_later(descriptor):
        nonlocal calls
        calls += 1
        # The first are the lock's owner, the checkpoint at the start, and config.json.
        if calls > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_later)
        result = run("train", "--data", folder, "--out", out, *SMALL)
    refused(result, r"run/checkpoint\.pt cannot be written: No space left on device; make room on its disk")
    assert f"go on with:\n  fastconv train --out {out} --resume" in result[1]
    assert sorted(os.listdir(out)) == [LOCK, "checkpoint.pt", "config.json"]
    assert checkpoint.load(out / "checkpoint.pt").epoch == 0
    assert run("train", "--out", out, "--resume")[0] == 0


def test_memory_that_cannot_be_had(run, folder, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loop.State, "train", fail)
    refused(run("train", "--data", folder, "--out", tmp_path / "run", *SMALL), "out of memory; give a smaller")


def test_a_step_that_cannot_be_captured(run, folder, tmp_path, monkeypatch):
    def fail(*_):
        raise CaptureError("CUDA refuses; leave --graph on out")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.State, "train", fail)
        result = run("train", "--data", folder, "--out", out, *SMALL)
    refused(result, "fastconv: CUDA refuses; leave --graph on out")
    assert f"go on with:\n  fastconv train --out {out} --resume" in result[1]


@pytest.mark.parametrize("package", ["torchinfo", "matplotlib"])
def test_a_missing_package_is_named_before_training(run, folder, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run("train", "--data", folder, "--out", tmp_path / "run")
    refused(result, rf'{package} cannot be imported .* install it with: pip install "fastconv\[train\]"')
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastconv.training.recipe.LARGEST_LR", 1e30)
    options = [*SMALL, "--lr", "1e30", "--weight-decay", "0"]
    code, out, _ = run("train", "--data", folder, "--out", tmp_path / "run", *options)
    assert code == 1
    assert "in epoch 1, step 2; " in out
    assert "is from before that. For a smaller --lr start a new run in another --out." in out
    assert checkpoint.load(tmp_path / "run/checkpoint.pt").step == 0


def test_deterministic(run, folder, tmp_path):
    try:
        code, _, _ = run("train", "--data", folder, "--out", tmp_path / "run", *SMALL, "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert code == 0


def test_the_backend_is_forced(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(backends._MODULES["portable"], "convnext_block", None)
    assert run("train", "--data", folder, "--out", tmp_path / "run", *SMALL, "--backend", "reference")[0] == 0


def test_evaluate(run, folder, trained):
    state = checkpoint.load(trained / "checkpoint.pt")
    code, out, _ = run("evaluate", "--checkpoint", trained / "checkpoint.pt", "--data", folder, "--json")
    assert code == 0
    results = json.loads(out)
    assert results["validation_loss"] == pytest.approx(state.history[-1]["validation_loss"])
    assert results["validation_accuracy"] == state.history[-1]["validation_accuracy"]
    assert results["test_accuracy"] == state.test["test_accuracy"]
    code, out, _ = run("evaluate", "--checkpoint", trained / "checkpoint.pt", "--data", folder)
    assert re.search(rf"test: +loss {results['test_loss']:.4f}, accuracy .* %, 6 images", out)


def test_results_that_are_not_finite(run, folder, trained, tmp_path):
    """Weights that are finite, but too large to compute with."""
    state = checkpoint.load(trained / "checkpoint.pt")
    state.model["bottleneck.weight"].fill_(3e38)
    state.save(tmp_path / "checkpoint.pt")
    picture = folder / "test/dark/0.png"
    code, out, err = run("evaluate", "--checkpoint", tmp_path / "checkpoint.pt", "--json")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"fastconv: the loss of 4 images in evaluation is (nan|inf)\n", err)
    code, out, err = run("predict", "--checkpoint", tmp_path / "checkpoint.pt", picture, "--json")
    assert (code, out) == (1, "")
    assert err == f"fastconv: {picture}: a probability is not finite; the weights are too large for this image\n"


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(1)
    paths = []
    for i, (mode, shape) in enumerate(
        [("RGB", (8, 8, 3)), ("L", (20, 31)), ("RGBA", (5, 9, 4)), ("LA", (8, 3, 2))]
    ):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(paths[-1])
    return paths


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_predict(run, trained, pictures):
    code, out, _ = run("predict", "--checkpoint", trained / "checkpoint.pt", *pictures, "--json")
    assert code == 0
    together = [json.loads(line) for line in out.splitlines()]
    assert [answer["image"] for answer in together] == [str(path) for path in pictures]
    for path, answer in zip(pictures, together, strict=True):
        probabilities = [c["probability"] for c in answer["classes"]]
        assert sum(probabilities) == pytest.approx(1)
        assert probabilities == sorted(probabilities, reverse=True)
        assert {c["class"] for c in answer["classes"]} == {"bright", "dark"}
        # What else is in the call makes no difference, to the last bit.
        _, alone, _ = run("predict", "--checkpoint", trained / "checkpoint.pt", path, "--json")
        assert json.loads(alone) == answer
    _, out, _ = run("predict", "--checkpoint", trained / "checkpoint.pt", pictures[0])
    best, other = together[0]["classes"]
    assert out == (
        f"{pictures[0]}: {best['class']} {100 * best['probability']:.1f} %, "
        f"{other['class']} {100 * other['probability']:.1f} %\n"
    )


def test_an_image_of_the_trained_size_is_seen_as_in_training(folder, trained):
    """By hand: pixels over 255, through the model by itself, softmax."""
    state = checkpoint.load(trained / "checkpoint.pt")
    path = folder / "test/dark/0.png"
    with Image.open(path) as image:
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255
    model = fastconv.Classifier(4, 1, 2, num_classes=2)
    model.load_state_dict(state.model)
    expected = model(pixels).softmax(1)[0]
    found = dict(prediction.predict(prediction.load_model(state, torch.device("cpu")), pixels, top=2))
    assert torch.equal(prediction.read_input(path, [3, 8, 8]), pixels)
    for label in (0, 1):
        assert found[label] == pytest.approx(expected[label].item(), rel=1e-6)


def test_predict_takes_one_image_at_a_time(trained):
    model = prediction.load_model(checkpoint.load(trained / "checkpoint.pt"), torch.device("cpu"))
    with pytest.raises(ValueError, match="got 2 images; expected one"):
        prediction.predict(model, torch.rand(2, 3, 8, 8))


def test_predict_names_a_bad_image_before_it_answers(run, trained, folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    result = run(
        "predict", "--checkpoint", trained / "checkpoint.pt", folder / "test/dark/0.png", tmp_path / "broken.png"
    )
    refused(result, "broken.png")
    assert result[1] == ""


def test_summary(run):
    code, out, _ = run("summary")
    assert code == 0
    assert "Total params: 235,434" in out
    assert re.search(r"Conv2d \(conv1\) +\[128, 256, 4, 4\] +12,800", out)
    assert "Total params: 235,434" not in run("summary", "--width", "16")[1]
    # More than any machine could hold.
    code, out, _ = run("summary", "--width", "9000", "--batch-size", "1000000")
    assert code == 0
    assert "[1000000, 9000, 8, 8]" in out


def test_info(run, monkeypatch):
    monkeypatch.setattr(backends, "_native_refuses", lambda *_: "there is no C++ compiler: install one")
    code, out, _ = run("info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(facts["operations"]["cpu"]) == set(backends.OPERATIONS)
    choice = facts["operations"]["cpu"]["convnext_block"]
    assert choice["runs"] == "portable"
    assert "on a CPU" in choice["refused"]["triton"]
    table = run("info")[1]
    assert all(operation in table for operation in backends.OPERATIONS)
    assert "there is no C++ compiler: install one" in " ".join(table.split())
    assert "native kernels" not in table


def test_info_reports_the_native_kernels(run, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(backends, "_native_refuses", lambda *_: None)
    found = Library(None, "key", "g++ 12.2.0", tmp_path / "key.so", True)
    monkeypatch.setattr(library, "describe", lambda: found)
    facts = json.loads(run("info", "--json")[1])
    assert facts["operations"]["cpu"]["convnext_block"]["runs"] == "native"
    assert facts["kernels"]["cpu"]["library"] == str(tmp_path / "key.so")
    assert (
        "native kernels on cpu, cpu: not tested\n"
        f"  compiled by g++ 12.2.0; library: {tmp_path}/key.so; PyTorch's threads\n"
    ) in run("info")[1]
    monkeypatch.setattr(library, "describe", lambda: found._replace(path=None, parallel=False))
    assert "  compiled by g++ 12.2.0; library: not kept; one thread\n" in run("info")[1]


def test_the_environment_forces_a_backend_and_sets_the_encoding():
    def info(*options, **environment):
        return run_python("-m", "fastconv", "info", *options, **environment)

    # Each process takes seconds to import torch.
    forced = info(FASTCONV_BACKEND="triton", TRITON_INTERPRET="0", PYTHONIOENCODING="ascii")
    assert forced.returncode == 0
    assert "nothing" in forced.stdout
    wrong = info(FASTCONV_BACKEND="fast")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("fastconv: FASTCONV_BACKEND is 'fast'; expected one of triton")


def test_help_and_version(run):
    code, out, _ = run("--version")
    assert (code, out) == (0, f"fastconv {machine.package_version('fastconv')}\n")
    for command in ("train", "evaluate", "predict", "summary", "info"):
        assert command in run("--help")[1]
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"fastconv {command}" in out
    assert "[default: runs/<date>-<time>]" in run("train", "--help")[1]


def start(folder, out, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "fastconv", "train", "--data", str(folder), "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


LONG = ["--epochs", "300", *SMALL[2:]]


def test_stopped_before_the_first_save(run, folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastconv.training.state.State.save", stop)
    code, out, _ = run("train", "--data", folder, "--out", tmp_path / "run", *SMALL)
    assert code == 130
    assert "stopped at once" in out
    assert "go on with" not in out
    monkeypatch.undo()
    # Nothing is in the way of another try.
    assert run("train", "--data", folder, "--out", tmp_path / "run", *SMALL)[0] == 0


def test_sigterm_before_training_unwinds(run, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_):
        with tempfile.TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(data, "load", stop)
    assert run("train", "--out", tmp_path / "run", *SMALL)[0] == 143
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(run, folder, tmp_path):
    """And while a process trains, others are refused its folder."""
    out = tmp_path / "a run"
    process = start(folder, out, *LONG)
    wait_for(out / "metrics.jsonl", process)
    owner = rf"in use by process {process.pid} on {re.escape(platform.node())}; wait until it ends"
    refused(run("train", "--out", out, "--resume"), owner)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 130, printed
    state = checkpoint.load(out / "checkpoint.pt")
    assert state.epoch < 300
    assert "Traceback" not in printed
    command = shlex.split(printed.splitlines()[-1])
    assert command == ["fastconv", "train", "--out", str(out), "--resume", "--data", str(folder)]
    (out / "metrics.jsonl").unlink()
    process = start(folder, out, "--resume")
    wait_for(out / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 143, printed
    assert shlex.split(printed.splitlines()[-1]) == command
    state = checkpoint.load(out / "checkpoint.pt")
    begun = state.epoch + (state.step > 0)
    if state.step:
        refused(
            run(*command[1:], "--epochs", state.epoch),
            f"the run has done {state.epoch} epochs and {state.step} steps of the next; "
            f"got --epochs {state.epoch}: give at least {begun}",
        )
    code, printed, _ = run(*command[1:], "--epochs", begun)
    assert code == 0
    assert f"{begun} epochs in" in printed
    assert sorted(os.listdir(out)) == [LOCK, *sorted(FILES)]


@pytest.mark.slow
def test_killed_at_random_moments_it_reaches_the_same_weights(folder, tmp_path):
    recipe = Recipe(epochs=40, batch_size=8, width=4, depth=1, patch=2)

    unbroken = loop.train(
        recipe, data.load(folder), torch.device("cpu"), tmp_path / "unbroken.pt", loop.Observer(), None
    )
    out, rng = tmp_path / "run", random.Random(0)
    options = ["--epochs", "40", *SMALL[2:]]
    for _ in range(2):
        process = start(folder, out, *options)
        wait_for(out / "checkpoint.pt", process)
        time.sleep(rng.uniform(0.02, 0.4))
        process.kill()
        process.wait()
        options = ["--resume"]
    # As a kill in the middle of writing leaves it.
    (out / ".checkpoint.pt.0123abcd.partial").touch()
    process = start(folder, out, *options)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    final = checkpoint.load(out / "checkpoint.pt")
    assert all(torch.equal(final.model[name], weight) for name, weight in unbroken.model.items())
    assert final.test == unbroken.test
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 40
    assert sorted(os.listdir(out)) == [LOCK, *sorted(FILES)]


def test_names_are_printed_as_they_are(run, folder, tmp_path, monkeypatch):
    """Rich would read brackets as markup, raise for some, and replace words between colons."""
    odd = tmp_path / "[red]a[/x] :smile:"
    images = shutil.copytree(folder, odd / "images")
    for split in ("train", "test"):
        os.rename(images / split / "dark", images / split / "[b]dark")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.State, "evaluate", stop)
        code, out, _ = run("train", "--data", images, "--out", odd / "run", *SMALL)
    assert code == 130
    assert f"Data: image folder, {images}\n" in out
    command = shlex.split(out.splitlines()[-1])
    assert command == ["fastconv", "train", "--out", str(odd / "run"), "--resume", "--data", str(images)]
    code, out, _ = run(*command[1:])
    assert code == 0
    assert f" in {odd / 'run'}\n" in out
    refused(run("train", "--out", odd / "images/train/bright/0.png"), re.escape("[red]a[/x] :smile:"))
    path = odd / "run/checkpoint.pt"
    assert "[b]dark " in run("predict", "--checkpoint", path, images / "test/bright/0.png")[1]
    assert f"{odd}/no.pt is not a file" in run("evaluate", "--checkpoint", odd / "no.pt")[2]
    refused(run("swap-report", "[red]"), re.escape("there is no model '[red]'"))
    refused(run("bench", "--only", "[/x]"), re.escape("holds '[/x]'"))
    monkeypatch.setattr(machine, "available_devices", lambda: {"cpu": "[/x] :smile:"})
    assert "[/x] :smile:;" in run("info")[1]
