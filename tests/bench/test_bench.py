"""The benchmarks' arithmetic, files and tables, for given times: no time is asserted."""

import json
import math

import pytest
import torch

import fastconv
from fastconv.bench import contenders, correctness, plots, results, suite, tables, timing, workloads
from fastconv.bench.ceilings import Ceilings
from fastconv.bench.correctness import Errors
from fastconv.bench.runner import BATCHES, Runner, exact_results
from fastconv.bench.tools import readme
from fastconv.kernels.common.errors import KernelError
from fastconv.operations import fallback, reference

CPU = torch.device("cpu")
SMALL = [
    kind(3, 2, 4)
    for kind in (*workloads.OPERATIONS, workloads.Stage, workloads.Classifier, workloads.TrainingStep)
]
COMMITTED = sorted(results.FOLDER.glob("*.json"))


def direct_flops(module, x):
    """2 operations for each input of each output, of all convolutions and products of maps that run."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        if output.dim() == 4:
            total += 2 * output.numel() * layer.weight[0].numel()

    layers = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    module(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("workload", SMALL, ids=str)
def test_operations_are_those_of_the_convolutions(workload):
    plain, _ = workload.modules()
    flops = direct_flops(plain, torch.rand(workload.input_shape))
    expected = {"forward": flops, "backward": 2 * flops, "both": 3 * flops}
    for direction in workload.directions:
        assert workload.cost(direction).flops == expected[direction]


def test_elements_are_inputs_outputs_and_parameters():
    workload = workloads.PointwiseConvGELU(3, 2, 4)
    x, y, parameters = 3 * 8 * 16, 3 * 2 * 16, 8 * 2 + 2
    assert workload.cost("forward").elements == x + y + parameters
    assert workload.cost("backward").elements == 2 * (x + parameters) + y
    both = workload.cost("both")
    assert both.elements == 3 * (x + parameters) + 2 * y
    epoch = workloads.Epoch(128, 32, 8).cost("both")
    step = workloads.TrainingStep(128, 32, 8).cost("both")
    assert epoch.flops == 313 * step.flops


@pytest.mark.parametrize("kind", workloads.CONVNEXTS, ids=lambda kind: kind.level)
def test_a_convnexts_cost_is_that_of_its_layers(kind):
    pytest.importorskip(kind.library, exc_type=ImportError)
    workload = kind(2, 96, 8)
    plain, fused = workload.modules()
    blocks = {type(m) for m in plain.modules() if type(m).__name__ in ("CNBlock", "ConvNeXtBlock")}
    assert len(blocks) == 1
    assert not blocks & set(map(type, fused.modules()))
    flops = direct_flops(plain, torch.rand(workload.input_shape))
    assert workload.pass_cost("forward").flops == flops
    assert workload.cost("both").flops == 3 * flops


def test_the_floor_is_the_longer_of_moving_and_multiplying():
    limits = Ceilings(gb_per_s=100, tflop_per_s=2)
    assert limits.floor_milliseconds(1e9, 1e9) == pytest.approx(10)
    assert limits.floor_milliseconds(1e6, 8e9) == pytest.approx(4)


def test_workloads_cover_the_lecture_and_the_homework():
    found = workloads.full()
    assert len(set(found)) == len(found)
    for kind in (*workloads.OPERATIONS, workloads.Classifier, workloads.TrainingStep):
        of_kind = [workload for workload in found if type(workload) is kind]
        assert {workload.images for workload in of_kind} == {1, 8, 32, 128, 512, 1024}
        assert {(workload.channels, workload.side) for workload in of_kind} >= {(32, 8), (32, 16), (64, 8)}
    assert workloads.Epoch in map(type, found)
    assert set(workloads.quick()) <= set(found)


@pytest.mark.parametrize("workload", SMALL, ids=str)
@pytest.mark.parametrize("name", ["eager", "eager channels_last", "fastconv"])
def test_contenders_compute_the_same(workload, name):
    contender = next(c for c in contenders.CONTENDERS if c.name == name)
    runner = Runner(contender, workload, CPU, torch.float32)
    errors = correctness.measure(runner.results(), exact_results(workload, CPU, torch.float32))
    assert 0 < errors.output < 1e-5
    assert 0 < errors.gradients < 1e-4


@pytest.mark.parametrize("direction", workloads.DIRECTIONS)
def test_calls_rotate_through_their_inputs(direction):
    runner = Runner(contenders.FASTCONV, SMALL[2], CPU, torch.float32)
    call = runner.call(direction)
    found = [call(i) for i in range(BATCHES + 1)]
    last = [tensors[-1] if isinstance(tensors, tuple) else tensors for tensors in found]
    assert torch.equal(last[0], last[BATCHES])
    assert not torch.equal(last[0], last[1])


def test_cuda_graphs_do_not_part_a_backward_from_its_forward():
    graphs = ("compile reduce-overhead", "eager in a CUDA graph", "fastconv in a CUDA graph")
    for contender in contenders.CONTENDERS:
        runner = Runner(contender, SMALL[1], CPU, torch.float32)
        assert runner.can_run("both")
        assert runner.can_run("backward") != (contender.name in graphs)


def test_a_training_step_trains_and_an_epoch_sees_all_images(monkeypatch):
    monkeypatch.setattr("fastconv.bench.runner.EPOCH_IMAGES", 7)
    runner = Runner(contenders.FASTCONV, workloads.Epoch(3, 2, 4), CPU, torch.float32)
    before = [p.detach().clone() for p in runner.parameters]
    seen = []
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda i: seen.append(len(runner.inputs[i])) or run(i))
    runner.call("both")(0)
    assert seen == [3, 3, 1]
    assert all(not torch.equal(p, old) for p, old in zip(runner.parameters, before, strict=True))


def run_pointwise(monkeypatch, advanced=lambda _: None):
    """The rows of a small workload, by eager PyTorch and by ours."""
    monkeypatch.setattr(suite, "MOST_ROUNDS", 5)
    chosen = [contenders.EAGER, contenders.FASTCONV]
    (rows,) = suite.run(SMALL[1:2], chosen, CPU, "float32", 0.0, advanced)
    return rows


def test_what_is_wrong_has_no_speedup(monkeypatch):
    monkeypatch.setattr(
        fastconv.PointwiseConvGELU,
        "forward",
        lambda self, x: reference.pointwise_conv_gelu(x, self.weight, 0.99 * self.bias),
    )
    rows = run_pointwise(monkeypatch)
    assert {(row["contender"], row["right"]) for row in rows} == {("eager", True), ("fastconv", False)}
    assert tables.speedups(rows).count("| wrong result |") == 3
    shape = {"channels": 32, "side": 8}
    assert {row["contender"] for row in plots.lecture_batch([row | shape for row in rows])} == {"eager"}


def test_a_contender_that_fails_is_a_row_and_the_rest_goes_on(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(fastconv.PointwiseConvGELU, "forward", fail)
    advances = []
    rows = run_pointwise(monkeypatch, advances.append)
    assert len(advances) == suite.steps(SMALL[1:2]) == 3
    failed = [row for row in rows if "failed" in row]
    assert {(row["contender"], row["failed"]) for row in failed} == {("fastconv", "ZeroDivisionError:")}
    assert "fastconv: ZeroDivisionError:" in tables.every_row(ABOUT, rows)


@pytest.mark.parametrize(
    ("errors", "right"),
    [
        ((2e-6, 2e-6), True),
        ((2e-5, 2e-5), True),
        ((2.1e-5, 0), False),
        ((0, 2.1e-5), False),
        ((math.nan, 0), False),
    ],
)
def test_right_is_at_most_twice_the_baselines_error(errors, right):
    assert Errors(*errors).right(Errors(1e-5, 1e-5), floor=5e-6) == right


@pytest.mark.parametrize("tensor", [0, 1], ids=["output", "gradient"])
def test_an_overflow_in_pytorch_excuses_nothing(monkeypatch, tensor):
    """Both results are as wrong as each other, but for an infinity in PyTorch's."""
    results = Runner.results

    def faulty(runner):
        found = results(runner)
        # The exact results are computed by a runner too.
        if runner.inputs[0].dtype == torch.float32:
            found[tensor] = 0.9 * found[tensor]
            if not runner.contender.fused:
                found[tensor].flatten()[0] = math.inf
        return found

    monkeypatch.setattr(Runner, "results", faulty)
    rows = run_pointwise(monkeypatch)
    assert {(row["contender"], row["right"]) for row in rows} == {("eager", False), ("fastconv", False)}


def test_turns_are_interleaved_and_each_has_a_call_before():
    called = []
    calls = {name: lambda i, name=name: called.append((name, i)) for name in "ab"}
    samples = timing.interleave(calls, rounds=2, warmup=1)
    assert [name for name, _ in called] == list("aabb" * 3)
    assert [i for name, i in called if name == "a"] == [-2, -1, 0, 1, 2, 3]
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}
    called.clear()
    timing.interleave(calls, rounds=1, warmup=0)
    assert called == [("a", 1), ("b", 1)]


def test_percentiles():
    assert timing.percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx((2, 3.5, 5))


def test_speedups_are_of_rounds():
    """A machine that is twice as slow in one round is so for all, and says nothing of their ratio."""
    row = suite.figures("ours", {"eager": [10.0, 20.0, 10.0], "ours": [5.0, 10.0, 5.0]}, 4000, 8000)
    assert row["speedup"] == (2, 2, 2)
    assert row["gb_per_s"] == pytest.approx(4000 / 5e-3 / 1e9)
    assert row["tflop_per_s"] == pytest.approx(8000 / 5e-3 / 1e12)


ABOUT = {
    "device": "A CPU",
    "driver": None,
    "threads": 2,
    "torch": "2.0",
    "triton": "3.0",
    "python": "3.11",
    "system": "Linux",
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2026-01-02",
}


def made_row(contender="fastconv", ms=(1.0, 1.1, 1.2), speedup=(2.0, 2.1, 2.2), **changed):
    row = dict(zip(results.KEY, ("convnext_block", 128, 32, 8, "both", "float32", contender), strict=True))
    row |= {"floor_ms": 0.1, "ms": list(ms), "rounds": 9, "speedup": list(speedup), "right": True}
    row |= {"kernel_ms": None, "peak_mib": 3.0, "output_error": 1e-7, "gradients_error": 1e-7}
    return row | {"gb_per_s": 1.0, "tflop_per_s": 0.1} | changed


def test_files_hold_what_was_written(tmp_path):
    path = tmp_path / "new" / "r.json"
    row = made_row(ms=timing.Percentiles(1 / 3, 0.5, 2 / 3), output_error=math.nan)
    results.write(path, ABOUT, [row])
    about, (found,) = results.read(path)
    assert about == ABOUT
    assert found == row | {"ms": [0.3333, 0.5, 0.6667], "output_error": None}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*: No such file"),
        ("{", "holds no results; expected a file that `fastconv bench` wrote"),
        ("[]", "holds no results"),
        ('{"schema": 7, "provenance": {}, "rows": []}', "has schema 7; this version reads 1"),
        (
            '{"schema": 1, "provenance": {}, "rows": [{"level": "inference"}]}',
            "has workloads inference; this version knows depthwise_conv.*: use the version that wrote it",
        ),
    ],
)
def test_files_that_are_not_ours(tmp_path, text, message):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(results.ResultsError, match=message):
        results.read(path)


def test_a_second_run_of_a_day_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    first = results.default_path(ABOUT)
    assert first.name == "a-cpu-2.0-2026-01-02.json"
    first.touch()
    assert results.default_path(ABOUT).name == "a-cpu-2.0-2026-01-02-2.json"


def test_what_moved_beyond_the_noise():
    before = [made_row("eager", (3, 3, 3), (1, 1, 1)), made_row(), made_row(images=1), made_row(images=8)]
    after = [
        # Slower as a whole is not slower by itself, but for the baseline, which has nothing to compare it with.
        made_row("eager", (6, 6, 6), (1, 1, 1)),
        made_row(ms=(2.0, 2.2, 2.4)),
        made_row(images=1, ms=(1.9, 2.2, 2.4), speedup=(1.0, 1.1, 1.2)),
        made_row(images=8, ms=(1.1, 1.3, 1.5), speedup=(1.0, 1.1, 1.2)),
        made_row(images=32),
    ]
    moves, count = results.compare(before, after)
    assert count == 4
    assert [(move.after["contender"], move.after["images"], move.factor) for move in moves] == [
        ("eager", 128, 2),
        ("fastconv", 1, pytest.approx(2)),
    ]
    text = tables.moved(moves, count)
    assert text.startswith("2 of 4 rows moved")
    assert "| fastconv | 1.10 | 2.20 | +100 % |" in text
    with pytest.raises(results.ResultsError, match="no workload in common"):
        results.compare(before, [made_row(images=2)])


def test_the_command_compares_files(run, tmp_path):
    paths = tmp_path / "a.json", tmp_path / "b.json"
    results.write(paths[0], ABOUT, [made_row()])
    results.write(paths[1], ABOUT | {"device": "Another"}, [made_row(ms=(2, 2, 2), speedup=(1, 1, 1))])
    code, out, err = run("bench", "--compare", *paths)
    assert (code, err) == (0, "")
    assert "A CPU, 2 threads, torch 2.0" in out
    assert "different devices" in out
    assert "1 of 1 rows moved" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no workload's name holds 'nothing'; there are"),
        (["--compare", "no.json", "such.json"], "cannot read no.json"),
        (["--device", "quantum"], "device is 'quantum'"),
    ],
)
def test_the_commands_errors(run, arguments, message):
    code, out, err = run("bench", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.slow
def test_the_command_times_keeps_and_draws(run, tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "quick", lambda: [workloads.ConvNextBlock(n, 32, 8) for n in (1, 2, 3)])
    monkeypatch.setattr(contenders, "QUICK", ("eager", "fastconv"))
    path = tmp_path / "r.json"
    code, out, _ = run("bench", "--quick", "--seconds", 0, "--out", path)
    assert code == 0
    about, rows = results.read(path)
    assert (about["threads"], about["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert len({results.key(row) for row in rows}) == len(rows) == 3 * 3 * 2
    for row in rows:
        assert row["right"]
        assert 0 < row["ms"][0] <= row["ms"][1] <= row["ms"][2]
        assert (row["contender"] == "eager") == (row["speedup"] == [1, 1, 1])
    assert out.count("| fastconv |") == 9
    assert_pictures_are_of(rows, path)


def assert_pictures_are_of(rows, path):
    """The pictures beside a file of results say that they were drawn from its rows."""
    for suffix, picture in plots.PICTURES.items():
        image = pytest.importorskip("PIL.Image").open(path.with_name(f"{path.stem}-{suffix}.png"))
        assert min(image.size) > 200
        assert image.text[plots.SOURCE] == plots.digest(picture.choose(rows))


def test_the_readme_shows_the_committed_results():
    text = readme.README.read_text()
    assert readme.rewritten(text) == text, "run python -m bench.tools.readme"
    for machine in readme.MACHINES:
        path = readme.committed(machine)
        assert_pictures_are_of(results.read(path)[1], path)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_say_where_they_come_from(path):
    about, rows = results.read(path)
    assert about["commit"]
    assert about["dirty"] is False
    assert all(row["right"] for row in rows if "failed" not in row)


def test_a_readme_without_the_marks():
    with pytest.raises(results.ResultsError, match="lacks the lines"):
        readme.rewritten("# fastconv\n")


def test_json_of_results_is_one_row_a_line(tmp_path):
    path = tmp_path / "r.json"
    results.write(path, ABOUT, [made_row(), made_row("eager")])
    lines = path.read_text().splitlines()
    assert sum(line.startswith('{"level"') for line in lines) == 2
    assert json.loads(path.read_text())["schema"] == results.SCHEMA


def test_a_fallback_is_not_timed_in_the_place_of_kernels():
    failures = {}
    error = KernelError("stencil", "too large")
    for name in ("first", "second"):
        with suite.noted(failures, name):
            fallback.warn_refused("layer_norm", error, torch.device("cpu"))
    assert failures.keys() == {"first", "second"}
    assert "stencil of layer_norm cannot run: too large" in failures["first"]
