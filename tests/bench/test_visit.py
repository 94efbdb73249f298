"""The visit to a GPU, as far as it goes without one: its plan, its cache of kernels, and what it prints."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import faults
import pytest
import torch
from processes import printed_by

pytest.importorskip("triton")
from fastconv.bench.tools import planned
from fastconv.bench.tools.visit import (
    compilations,
    kernel_cache,
    measure,
    parts,
    prove,
    pytest_outcomes,
    report,
    tilings,
    training,
    whole,
)
from fastconv.operations import setting
from fastconv.training import Recipe, loop
from fastconv.training.cifar10 import CIFAR10_CLASSES
from fastconv.training.data import Dataset, ImageSet

SCRIPT = parts.ROOT / "bench/gpu.sh"
# Seconds that all three calls may take together, and that each start of the machine takes.
VISIT, START = 900, 80


def script(*arguments):
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_the_scripts_usage():
    for arguments in ([], ["prove"], ["dance", "out"]):
        done = script(*arguments)
        usage = "usage: bench/gpu.sh [--gpu] prove|measure|whole OUT [DATA]\n"
        assert (done.returncode, done.stderr) == (2, usage)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_refuses_to_visit_a_gpu_that_is_not_there(tmp_path):
    done = script("--gpu", "prove", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("no GPU here; without --gpu this is a rehearsal\n")


def test_the_stages_fit_into_their_limits_and_these_into_the_visit():
    limits = {name: int(seconds) for name, seconds in re.findall(r"(\w+)\) limit=(\d+) ;;", SCRIPT.read_text())}
    assert sum(limits.values()) + len(limits) * START <= VISIT
    # Python and PyTorch start, an archive is unpacked and another packed.
    around, grace = 20, int(re.search(r"grace=(\d+)", SCRIPT.read_text())[1])
    for stage in (prove, measure, whole):
        steps = sum(seconds for name, seconds in vars(stage).items() if name.endswith("_SECONDS"))
        assert steps + around + grace <= limits[stage.__name__.rpartition(".")[2]]


def test_it_needs_no_package_but_torch_and_triton():
    """Only pytest besides, which runs the tests: a bare machine has no others."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("typer", "rich", "torchvision", "torchinfo", "matplotlib", "PIL"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import fastconv.bench.tools.visit.prove, fastconv.bench.tools.visit.measure, fastconv.bench.tools.visit.whole
import fastconv.bench.tools.visit.benchmarks, fastconv.bench.tools.visit.training
import fastconv.bench.tools.visit.first_timings, fastconv.bench.tools.visit.tilings
"""
    printed_by("-c", code)


@pytest.mark.parametrize("way", sorted({run.way for run in training.RUNS}), ids=lambda way: way.name)
def test_each_way_to_train_runs_as_it_says(way, monkeypatch):
    """The last run of the three is the one whose numbers are kept."""
    seen = []

    def prepare(*arguments, prepare=loop.prepare):
        seen.append([setting.current(), None, False])
        return prepare(*arguments)

    def go_on(state, path, observer, graph, go_on=loop.go_on):
        seen[-1][1] = graph
        return go_on(state, path, observer, "off")

    monkeypatch.setattr(loop, "prepare", prepare)
    monkeypatch.setattr(loop, "go_on", go_on)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: seen[-1].__setitem__(2, True))
    monkeypatch.setattr(training, "DEVICE", torch.device("cpu"))
    images = ImageSet(torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (50,)))
    dataset = Dataset(images, images, CIFAR10_CLASSES, "random images")
    recipe = Recipe(epochs=2, batch_size=8, width=2, depth=1, limit=16)
    found = training.run(way, recipe, dataset)
    assert seen == [[way.backend, way.graph, way.compiled]] * 3
    assert (len(found["history"]), found["recipe"]["limit"]) == (2, 16)


def test_each_tiling_to_try_is_another_and_only_for_its_plan():
    def launches(alternative=()):
        steps = planned.PlannedSteps(torch.bfloat16, "meta", planned.Sizes(depth=1))
        calls = tilings.make_plan(steps, alternative).calls
        return [(launch.programs, launch.numbers, launch.constants) for launch, _ in calls]

    default = launches()
    tried = [launches(alternative) for choice in tilings.CHOICES for alternative in choice]
    assert all(found != default for found in tried)
    assert len(tried) == len({str(found) for found in tried})
    assert launches() == default


# Launches the kernels of a layer norm, forward and backward.
LAUNCHES = """
import torch
from fastconv import functional
from fastconv.bench.tools.visit import compilations
from fastconv.bench.tools.visit.kernels_only import Uncomputed, kernels_only
compilations.count()
with kernels_only(), Uncomputed():
    functional.layer_norm(torch.rand(2, 3, 4, 4, requires_grad=True)).sum().backward()
"""


def launch_kernels(folder):
    """What Triton found in the cache `folder`/cache, and what it compiled into it."""
    environment = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_STORE_BINARY_ONLY": "1"}
    environment |= {compilations.VARIABLE: str(folder / "noted"), "FASTCONV_SELFTEST": "0"}
    printed_by("-c", LAUNCHES, **environment, TRITON_INTERPRET=None)
    return compilations.found(folder / "noted")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's driver is loaded: kernels run on the GPU")
def test_kernels_that_were_packed_are_found_elsewhere(tmp_path):
    compiled = launch_kernels(tmp_path / "here")
    assert len(compiled) > 2
    assert not any(line["hit"] for line in compiled)
    archive = tmp_path / "kernels.tar.xz"
    count = kernel_cache.pack(tmp_path / "here/cache", archive)
    # Where they lay before there is nothing any more.
    (tmp_path / "here").rename(tmp_path / "gone")
    assert kernel_cache.unpack(archive, tmp_path / "there/cache") == count
    found = launch_kernels(tmp_path / "there")
    assert all(line["hit"] for line in found)
    assert {line["entry"] for line in found} == {line["entry"] for line in compiled}


def make_cache(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__grp__kernel.json").write_text(json.dumps({"child_paths": {"kernel.cubin": "/gone"}}))
        (folder / name / "kernel.cubin").write_text(name)
    return folder


def test_only_what_is_new_is_packed_and_paths_are_rewritten(tmp_path):
    cache, archive = make_cache(tmp_path / "a", "OLD", "NEW"), tmp_path / "out/kernels.tar.xz"
    assert kernel_cache.pack(cache, archive, without={"OLD"}) == 1
    assert list(archive.parent.iterdir()) == [archive]
    elsewhere = make_cache(tmp_path / "b", "OTHER")
    assert kernel_cache.unpack(archive, elsewhere) == 2
    assert kernel_cache.entries(elsewhere) == {"NEW", "OTHER"}
    group = json.loads((elsewhere / "NEW/__grp__kernel.json").read_text())
    assert group == {"child_paths": {"kernel.cubin": str(elsewhere / "NEW/kernel.cubin")}}


def test_kernels_of_another_triton_are_refused(tmp_path, monkeypatch):
    archive = tmp_path / "kernels.tar.xz"
    monkeypatch.setattr(kernel_cache, "key", lambda: "of another")
    kernel_cache.pack(make_cache(tmp_path / "a", "KERNEL"), archive)
    monkeypatch.undo()
    message = f"kernels.tar.xz has key of another .*; expected {kernel_cache.key()} .*: kernels are compiled anew"
    with pytest.raises(ValueError, match=message):
        kernel_cache.unpack(archive, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_damaged_archive_is_an_error(tmp_path):
    archive = tmp_path / "kernels.tar.xz"
    archive.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"(?s)is damaged .*; fill the cache again"):
        kernel_cache.read_manifest(archive)


def test_what_was_compiled_is_reported_by_name(tmp_path):
    lines = [{"kernel": "a", "hit": True}, {"kernel": "b", "hit": False}, {"kernel": "b", "hit": False}]
    for process, line in enumerate(lines):
        (tmp_path / str(process)).write_text(json.dumps(line) + "\n")
    assert compilations.report(tmp_path) == "kernels: 1 found in the cache, 2 compiled: 2 b"


def test_parts_run_together_and_are_stopped_at_their_limit(tmp_path, capsys):
    def part(name, code):
        return parts.Part(name, [sys.executable, "-u", "-c", code], {"WORD": name})

    started = time.monotonic()
    endless = "import os, time; print(os.environ['WORD']); time.sleep(60)"
    parts.run([part("short", "raise SystemExit(3)"), part("endless", endless)], 1.0, tmp_path)
    assert time.monotonic() - started < 1 + parts.GRACE
    short, stopped = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"== short: exit code 3 after \d+ s", short)
    assert stopped == "== endless: stopped at its limit of 1 s"
    # What it had printed is kept.
    assert (tmp_path / "endless.txt").read_text().startswith("endless\n")


def made_outcome(test="tests/test_a.py::test_b[c]", outcome="passed", message=""):
    return {"test": test, "outcome": outcome, "seconds": 0.1, "message": message}


def test_failures_are_a_line_each_and_not_too_many():
    failed = [made_outcome(outcome="failed", message="x" * 1000)] * (report.MOST_FAILED + 2)
    counts, *lines, rest = report.tests([made_outcome(), *failed])
    assert counts == "tests: 37 failed, 1 passed"
    assert len(lines) == report.MOST_FAILED
    assert {len(line) for line in lines} == {report.LINE}
    assert lines[0].startswith("FAILED test_a.py::test_b[c]: xxx")
    assert rest == "and 2 more"


def test_wrong_cases_are_a_line_each():
    case = {"subject": "layer_norm", "options": {"norm": "tensor"}, "precision": "float32", "given": "8x8"}
    results = [{**case, "verdict": "right", "reason": ""}, {**case, "verdict": "wrong", "reason": "x: error 1"}]
    results.append({"verdict": "wrong", "reason": "losses differ"})
    assert report.check(results) == [
        "check: 1 right, 2 wrong",
        "WRONG layer_norm, tensor, float32, 8x8: x: error 1",
        "WRONG training: losses differ",
    ]


def test_a_line_that_was_cut_by_the_end_of_its_process_is_left_out(tmp_path):
    (tmp_path / "lines").write_text('{"a": 1}\n{"a": 2')
    assert report.read(tmp_path / "lines") == [{"a": 1}]
    assert report.read(tmp_path / "missing") == []


def test_timings_are_a_line_for_each_direction():
    row = {"level": "convnext_block", "images": 8, "channels": 32, "side": 4, "dtype": "tf32", "direction": "both"}
    row |= {"ms": [0.1, 0.2, 0.3], "right": True, "speedup": [1, 1, 1], "contender": "eager"}
    rows = [
        row,
        {**row, "contender": "fastconv", "ms": [0.1, 0.1, 0.1], "speedup": [1.9, 2.0, 2.1]},
        {**row, "contender": "compile", "right": False},
        {**row, "contender": "other", "failed": "RuntimeError: no"},
    ]
    assert report.timings(rows) == [
        "convnext_block, forward and backward, 32 channels, 4 x 4, batch 8, tf32: "
        "eager 200 us; fastconv 100 us (2.00x); compile 200 us WRONG; other failed (RuntimeError: no)"
    ]


def test_profiles_are_a_line_for_each_kernel():
    header = ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *report.METRICS))
    printed = f'==PROF== Connected\n{header}\n"","","ns","%","%","register"\n"0","sum","10","20","30","40"\n'
    assert report.kernels(printed) == ["sum: 10 ns, 20 % of DRAM's peak, 30 % of multiprocessors', 40 registers"]
    assert report.kernels("ERR_NVGPUCTRPERM") == ["no profile: ERR_NVGPUCTRPERM"]


def test_outcomes_are_kept_as_they_come(tmp_path, monkeypatch):
    file = tmp_path / "outcomes.jsonl"
    monkeypatch.setenv(pytest_outcomes.VARIABLE, str(file))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def outcome(when, result, properties=(), text=None):
        return pytest.TestReport("t.py::t", ("t.py", 1, "t"), {}, result, text, when, user_properties=properties)

    pytest_outcomes.pytest_runtest_logreport(outcome("setup", "passed"))
    pytest_outcomes.pytest_runtest_logreport(outcome("call", "passed", [("found", "0 errors")]))
    pytest_outcomes.pytest_runtest_logreport(outcome("call", "failed", text="worker crashed\nhere"))
    assert [(line["outcome"], line["message"]) for line in report.read(file)] == [
        ("passed", "found: 0 errors"),
        ("failed", "worker crashed here"),
    ]


def test_a_fault_on_the_gpu_is_its_tests(monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    request = SimpleNamespace(node=SimpleNamespace(nodeid="t.py::t"))
    with pytest.raises(pytest.exit.Exception, match=r"^after t.py::t: CUDA error: an illegal memory access .*ed$"):
        faults.stop_after_fault(request)
