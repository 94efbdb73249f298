"""`fastconv check`: right where all is right, and wrong, in the right rows, where a fault is planted."""

import io
import json
import re

import pytest
import torch
from torch.nn import functional as F

import fastconv
from fastconv import accuracy
from fastconv.checking import divergence, graphs, problems, runner
from fastconv.checking.cases import MODULES, OPERATIONS, Case, all_cases
from fastconv.checking.inputs import INPUTS
from fastconv.checking.report import Graphs, Report, Result, Training
from fastconv.commands import check as command
from fastconv.operations import autograd, backends, columns, decisions, functional, portable
from fastconv.training import state
from fastconv.training.recipe import Recipe
from fastconv.training.stepper import AutogradStepper

CPU = torch.device("cpu")
NORMED = {"layer_norm", "depthwise_conv_layer_norm", "convnext_block", "DepthwiseConvLayerNorm", "ConvNextBlock"}
FLOAT32 = [case for case in all_cases() if case.precision == "float32"]
CONVOLVING = NORMED - {"layer_norm"} | {"Classifier"}


@pytest.fixture
def quick(monkeypatch):
    """A training that takes a second."""
    monkeypatch.setattr(divergence, "LECTURE", divergence.SMALL)


@pytest.fixture
def wrong_cases(monkeypatch, nothing_small):
    """{(subject, input)} of the float32 cases that are wrong; the others are right."""
    # Faults are no matter of chance.
    monkeypatch.setattr(accuracy, "SAMPLES", 1)

    def call():
        with fastconv.backend("portable"):
            results = [runner.examine(case, CPU) for case in FLOAT32]
        assert {result.verdict for result in results} <= {"right", "wrong"}
        assert all((result.verdict == "wrong") == bool(result.reason) for result in results)
        return {(result.case.subject, result.case.given) for result in results if result.verdict == "wrong"}

    return call


def test_right_here(run, quick, monkeypatch):
    """Every case, on few samples: the report for people, and with --json every number."""
    monkeypatch.setattr(accuracy, "SAMPLES", 2)
    code, out, err = run("check", "--backend", "portable", "--json")
    assert code == 0, err
    tried = all_cases()
    skipped = sum(case.precision == "tf32" for case in tried)
    summary = rf"fastconv check: {len(tried) - skipped + 1} right, 0 wrong, {skipped + 1} skipped in \d+ s"
    assert re.fullmatch(summary, err.splitlines()[-1])
    assert f"skipped {skipped}: tf32 is a format of GPUs" in err
    assert "skipped 1: cpu has no CUDA graphs" in err
    for subject in (*OPERATIONS, *MODULES):
        assert re.search(rf"^{subject} .* float32 +portable +\d+ .* \d\.\de-\d\d .* right *$", err, re.MULTILINE)
    assert re.search(r"^loss at step +1 +10 +20 +30 +40 +50 *$", err, re.MULTILINE)
    assert "\x1b" not in err, "control codes in what is not a terminal"
    assert "…" not in err, "a cell was cut"

    found = json.loads(out)
    assert found["verdict"] == "right"
    assert (found["device"], found["backend"]) == ("cpu", "portable")
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [case["subject"] for case in found["cases"]] == [case.subject for case in tried]
    for case, result in zip(tried, found["cases"], strict=True):
        assert (result["options"], result["precision"], result["given"]) == (
            case.options,
            case.precision,
            case.given,
        )
        if case.precision == "tf32":
            assert (result["verdict"], result["backend"], result["errors"]) == ("skipped", None, {})
            continue
        assert (result["verdict"], result["backend"]) == ("right", "portable")
        tensors = [name for name, tensor in problems.pose(case).tensors.items() if tensor is not None]
        assert list(result["errors"]) == ["output", *tensors]
        for error in result["errors"].values():
            assert 0 <= error["ours"] <= error["bound"]
    training = found["training"]
    assert training["difference"] <= training["bound"]
    for name in ("fused", "reference", "neighbour"):
        assert len(training[name]) == 50


@pytest.fixture
def pointwise_cases(monkeypatch):
    few = [case for case in all_cases() if case.subject in ("pointwise_conv_gelu", "patch_conv")]
    monkeypatch.setattr(command, "all_cases", lambda: few)


def test_the_report_is_on_standard_output(run, quick, pointwise_cases):
    code, out, err = run("check", "--backend", "portable")
    assert (code, err) == (0, ""), out
    assert re.search(r"^patch_conv .* float32 +portable .* right *$", out, re.MULTILINE)
    assert out.splitlines()[-1].startswith("fastconv check: ")


def test_cases_cover_every_axis():
    found = all_cases()
    assert set(backends.OPERATIONS) == set(OPERATIONS)
    assert {name for name in fastconv.__all__ if isinstance(getattr(fastconv, name), type)} >= set(MODULES)
    for subject in NORMED:
        assert {case.options["norm"] for case in found if case.subject == subject} == set(functional.NORMS)
        for affine in (False, True):
            assert any(case.input.affine == affine for case in found if case.subject == subject)
    for subject in OPERATIONS:
        precisions = {case.precision for case in found if case.subject == subject}
        assert precisions >= {"float32", "float16", "bfloat16"}
        layouts = {case.input.layout for case in FLOAT32 if case.subject == subject}
        assert layouts == set(accuracy.FORMATS)
    for subject in MODULES:
        assert "autocast" in {case.precision for case in found if case.subject == subject}
    sizes = [given.sizes for given in INPUTS.values()]
    layouts = {decisions.layout(each.images, each.height * each.width) for each in sizes}
    assert layouts == {"batch last", "channels last"}


def test_a_dropped_tap_is_wrong(monkeypatch, wrong_cases):
    toeplitz_matrix = columns.toeplitz_matrix

    def drop(weight, channels, geometry):
        weight = weight.clone()
        weight[..., -1, weight.shape[3] // 2] = 0
        return toeplitz_matrix(weight, channels, geometry)

    monkeypatch.setattr(columns, "toeplitz_matrix", drop)
    wrong = wrong_cases()
    assert {subject for subject, _ in wrong} == CONVOLVING
    # A tap that reaches three rows down has nothing to see on maps of two rows, and those of 11 x 7 pixels take
    # PyTorch's convolution.
    seen = {"8x8", "8x8 channels_last", "4x4 sliced", "one 7x7 image", "mean 1000 x std", "std 0.01"}
    assert {given for _, given in wrong} == seen


def test_a_swapped_multiplier_index_is_wrong(monkeypatch, wrong_cases):
    convolve = autograd.convolve

    def swap(x, weight, geometry):
        h, matrix = convolve(x, weight, geometry)
        return h.unflatten(0, (x.shape[0], -1)).transpose(0, 1).flatten(0, 1).contiguous(), matrix

    monkeypatch.setattr(autograd, "convolve", swap)
    assert wrong_cases() == {(case.subject, case.given) for case in FLOAT32 if case.subject in CONVOLVING}


def test_variance_as_a_difference_of_squares_is_wrong(monkeypatch, wrong_cases):
    def centre(h, bias, dims, eps, geometry, group, level=None):
        if bias is not None:
            h.add_(bias[:, None, None])
        mean = h.mean(dims, keepdim=True)
        scale = (h.square().mean(dims, keepdim=True) - mean.square() + eps).rsqrt()
        h.sub_(mean)
        return scale, None

    monkeypatch.setattr(autograd, "centre", centre)
    monkeypatch.setattr(autograd, "median", lambda x, dims: 0)
    wrong = wrong_cases()
    assert {subject for subject, given in wrong if given == "mean 1000 x std"} == NORMED & set(OPERATIONS)
    # Four channels may by chance be as nearly equal as that.
    assert {subject for subject, given in wrong if given != "mean 1000 x std"} <= {"layer_norm"}


def test_an_ignored_stride_is_wrong(monkeypatch, wrong_cases):
    to_columns = autograd.to_columns

    def ignore(x, geometry):
        return to_columns(x.as_strided(x.shape, torch.empty(x.shape).stride()), geometry)

    monkeypatch.setattr(autograd, "to_columns", ignore)
    wrong = wrong_cases()
    for subject in NORMED & set(OPERATIONS):
        given = {given for name, given in wrong if name == subject}
        assert given >= {"8x8 channels_last", "4x4 sliced", "11x7 sliced, no bias", "2x3 under a 9x5 kernel"}
    assert ("layer_norm", "8x8") not in wrong


def test_an_ignored_eps_is_wrong(monkeypatch, wrong_cases):
    centre = autograd.centre
    monkeypatch.setattr(
        autograd, "centre", lambda h, bias, dims, eps, geometry: centre(h, bias, dims, 0, geometry)
    )
    assert wrong_cases() >= {(subject, "std 0.01") for subject in NORMED & set(OPERATIONS)}


def examine(subject, given, precision="float32", **options):
    return runner.examine(Case(subject, options, precision, given), CPU)


@pytest.mark.interpreted
def test_faults_in_triton_kernels_are_wrong(monkeypatch):
    pytest.importorskip("triton")
    import faulty_kernels

    from fastconv.kernels.layer_norm import kernels as norm
    from fastconv.kernels.toeplitz import kernels as depthwise

    with fastconv.backend("triton"):
        assert examine("layer_norm", "mean 1000 x std", norm="tensor").verdict == "right"
        assert examine("depthwise_conv_layer_norm", "4x4 sliced", norm="tensor").verdict == "right"
        with monkeypatch.context() as planted:
            planted.setattr(norm, "store_moments", faulty_kernels.store_moments)
            assert examine("layer_norm", "8x8", norm="tensor").verdict == "right"
            assert examine("layer_norm", "mean 1000 x std", norm="tensor").verdict == "wrong"
        with monkeypatch.context() as planted:
            planted.setattr(norm, "element_offset", faulty_kernels.element_offset)
            assert examine("layer_norm", "8x8", norm="sample").verdict == "right"
            assert examine("layer_norm", "8x8 channels_last", norm="sample").verdict == "wrong"
        monkeypatch.setattr(depthwise, "load_toeplitz", faulty_kernels.load_toeplitz)
        result = examine("depthwise_conv_layer_norm", "4x4 sliced", norm="tensor")
        assert result.verdict == "wrong"
        assert result.errors["x"].ours > 0.01


@pytest.mark.interpreted
def test_what_the_interpreter_cannot_show_is_skipped():
    pytest.importorskip("triton")
    with fastconv.backend("triton"):
        assert "would take minutes" in examine("convnext_block", "8x8", norm="channel").reason
        for case in (("layer_norm", "8x8", "bfloat16"), ("ConvNextBlock", "4x4 sliced", "autocast")):
            result = examine(*case, norm="tensor")
            assert (result.verdict, result.backend) == ("skipped", None)
            assert "interpreter computes with the bits of bfloat16" in result.reason


def test_an_interpreter_that_fails_is_said_once(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError from TypeError("only 0-dimensional\narrays")

    monkeypatch.setattr(runner, "interprets", lambda *_: True)
    monkeypatch.setattr(functional, "layer_norm", fail)
    code, out, err = run("check")
    assert (code, out) == (2, "")
    assert err.startswith(
        "fastconv: Triton's interpreter fails here (TypeError: only 0-dimensional arrays); it needs"
    )
    assert err.count("\n") == 1


def test_an_error_is_wrong_and_the_rest_goes_on(run, monkeypatch, quick, pointwise_cases):
    def fail(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(portable, "pointwise_conv_gelu", fail)
    code, out, err = run("check", "--backend", "portable", "--json")
    assert code == 1
    text = "WRONG pointwise_conv_gelu, none, float32, 8x8: RuntimeError: no such luck; and 7 other inputs"
    assert text in err.splitlines()
    found = json.loads(out)
    assert found["verdict"] == "wrong"
    for case in found["cases"]:
        broken = case["subject"] == "pointwise_conv_gelu" and case["precision"] != "tf32"
        assert (case["verdict"] == "wrong") == broken
    counts = f"{found['right']} right, {found['wrong']} wrong, {found['skipped']} skipped"
    assert err.splitlines()[-1].startswith(f"fastconv check: WRONG: {counts} in ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_wrong(monkeypatch, value):
    monkeypatch.setattr(portable, "patch_conv", lambda x, conv: F.conv2d(x, *conv, 2) * value)
    with fastconv.backend("portable"):
        result = examine("patch_conv", "8x8")
    assert result.verdict == "wrong"
    assert json.loads(json.dumps(result.as_json(), allow_nan=False))["errors"]["output"]["ours"] is None


def test_the_rule():
    error = accuracy.Error
    assert error(2e-3, 1e-3, 1e-4).right
    assert not error(2.1e-3, 1e-3, 1e-4).right
    assert error(1e-4, 0.0, 1e-4).right
    for bad in (torch.nan, torch.inf):
        assert not error(bad, 1e-3, 1e-4).right
        assert not error(bad, bad, 1e-4).right
        # That PyTorch overflows does not make any number right.
        assert not error(1e-3, bad, 1e-4).right
    zero, tiny = torch.zeros(2), torch.full((2,), 1e-30)
    measured = accuracy.measure(lambda: {"a": (zero, zero, zero), "b": (tiny, zero, zero)}, 1e-4, 1)
    assert measured["a"].right
    assert not measured["b"].right
    with pytest.raises(ValueError, match=r"a is torch.float32 \(2,\); expected torch.float32 \(3,\)"):
        accuracy.measure(lambda: {"a": (zero, zero, torch.zeros(3))}, 1e-4, 1)


@pytest.mark.parametrize(("again", "verdict"), [(0.9, "right"), (1.1, "wrong")])
def test_a_near_miss_is_tried_on_more_samples(monkeypatch, again, verdict):
    tried = []

    def measure(sample, floor, samples):
        tried.append(samples)
        return {"x": accuracy.Error(floor * (1.5 if len(tried) == 1 else again), 0.0, floor)}

    monkeypatch.setattr(accuracy, "measure", measure)
    assert examine("patch_conv", "8x8").verdict == verdict
    assert tried == [accuracy.SAMPLES, 8 * accuracy.SAMPLES]


def test_training_is_wrong_if_gelu_is_only_approximated(monkeypatch, quick):
    assert runner.examine_training(CPU, lambda: None).verdict == "right"
    block = functional.convnext_block
    monkeypatch.setattr(functional, "convnext_block", lambda *p, **o: block(*p, **{**o, "approximate": "tanh"}))
    training = runner.examine_training(CPU, lambda: None)
    assert training.verdict == "wrong"
    assert "losses differ by" in training.reason


def test_training_is_wrong_if_a_gradient_is(monkeypatch, quick):
    fold_onto_taps = columns.fold_onto_taps

    def drop(*arguments):
        grad = fold_onto_taps(*arguments)
        grad[..., 0] = 0
        return grad

    monkeypatch.setattr(columns, "fold_onto_taps", drop)
    with fastconv.backend("portable"):
        assert runner.examine_training(CPU, lambda: None).verdict == "wrong"


def test_training_that_ends_in_nan_is_wrong(monkeypatch, quick):
    monkeypatch.setattr(portable, "layer_norm", lambda x, _: x * torch.nan)
    with fastconv.backend("portable"):
        training = runner.examine_training(CPU, lambda: None)
    assert training.verdict == "wrong"
    assert training.as_json()["fused"] == [None] * 50


def test_checking_nothing_is_not_right():
    skipped = Result(all_cases()[0], None, "skipped", "no reason")
    assert not Report(CPU, [skipped], Training("skipped"), Graphs("skipped"), 0.0).right


def test_results_are_kept_as_soon_as_they_are_there(monkeypatch):
    monkeypatch.setattr(runner, "examine_training", lambda *_: Training("wrong", "no reason"))
    kept, seen = io.StringIO(), []
    first = [case for case in all_cases() if case.subject == "layer_norm"][:2]
    report = runner.run(CPU, first, lambda _: seen.append(kept.getvalue().count("\n")), kept)
    assert seen == [1, 2]
    lines = [json.loads(line) for line in kept.getvalue().splitlines()]
    assert lines == [result.as_json() for result in report.all_results]


@pytest.fixture
def graphs_rehearsed(monkeypatch):
    """A training of seconds, whose steps in graphs are the steps themselves."""
    monkeypatch.setattr(graphs, "RECIPE", Recipe(epochs=2, batch_size=32, width=4, depth=1))

    monkeypatch.setattr(state, "graphed", lambda stepper, graph, note: stepper)


def test_training_in_graphs_is_right_if_no_bit_differs(graphs_rehearsed):
    assert graphs.compare(CPU, lambda: None) is None


@pytest.mark.parametrize(("method", "call", "name"), [("train", 24, "the loss"), ("evaluate", 7, "an evaluation")])
def test_training_in_graphs_is_wrong_if_a_bit_differs(graphs_rehearsed, monkeypatch, method, call, name):
    """In the second of the two trainings, of 14 steps and 4 of evaluations each."""
    calls = 0
    original = getattr(AutogradStepper, method)

    def spoil(stepper, size):
        nonlocal calls
        calls += 1
        original(stepper, size)
        if calls == call:
            tally = stepper.trained if method == "train" else stepper.evaluated
            tally.losses.mul_(1 + 2**-20)

    monkeypatch.setattr(AutogradStepper, method, spoil)
    found = graphs.compare(CPU, lambda: None)
    assert found == f"{name} differs between steps in a CUDA graph and the same steps without"
