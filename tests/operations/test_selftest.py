"""The first use of kernels on a GPU that nobody has proved, and what runs where kernels fail.

"auto" takes kernels that are planted, on CPU tensors, as if these were on a GPU.
"""

import functools
import json
import shutil
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch
from cases import draw
from oracle import assert_accurate
from processes import printed_by
from torch.utils.checkpoint import checkpoint

import fastconv
from fastconv import accuracy, machine
from fastconv.checking.inputs import Sizes
from fastconv.kernels.common.errors import KernelError
from fastconv.kernels.common.values import Convolution, Norm, tensors_in
from fastconv.kernels.cpu import library
from fastconv.kernels.cpu.library import Library
from fastconv.kernels.decisions import LARGEST_TOEPLITZ_MAP
from fastconv.operations import (
    backends,
    definition,
    dispatch,
    fallback,
    functional,
    portable,
    reference,
    selftest,
    verdicts,
)

CPU = torch.device("cpu")
NORM = Norm("tensor", 1e-5, None, None)
X = torch.linspace(-1, 1, 3 * 4 * 5 * 6).view(3, 4, 5, 6)


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Make a process in which nothing was tried, where "auto" takes the planted operations for a backend's."""
    always = "portable", "reference"

    def make(backend="triton", **operations):
        kernels = types.SimpleNamespace(**{name: right(name) for name in backends.OPERATIONS})
        vars(kernels).update(operations)
        monkeypatch.setitem(backends._MODULES, backend, kernels)
        monkeypatch.setattr(backends, "can_run", lambda name, *_: None if name in (backend, *always) else "no")
        monkeypatch.setattr(dispatch, "_CHOSEN", {})
        monkeypatch.setattr(selftest, "_TRUSTED", {})
        monkeypatch.setattr(fallback, "_WARNED", set())

    monkeypatch.setenv("FASTCONV_SELFTEST", "1")
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    return make


def right(operation):
    return functools.partial(definition.call, operation)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def counted(operation, calls):
    def call(*args, **kwargs):
        calls.append(threading.current_thread() is threading.main_thread())
        return operation(*args, **kwargs)

    return call


def wrong_norm(x, norm):
    """Off by a hundredth."""
    return definition.call("layer_norm", x, norm) * 1.01


def wrong_gradient(x, norm):
    """Right forward, and a gradient that is off by a hundredth."""
    y = definition.call("layer_norm", x, norm)
    return y.detach() + 1.01 * (y - y.detach())


def refuse(*_, **__):
    raise KernelError("norm_forward", "needs 131072 bytes of shared memory, this GPU has 101376")


def recorded(folder):
    """The verdicts in the file."""
    (path,) = (folder / "selftest").glob("*.json")
    return json.loads(path.read_text())["verdicts"]


def test_right_kernels_run_after_one_test(plant, silent, tmp_path):
    calls = []
    plant(layer_norm=counted(right("layer_norm"), calls))
    for _ in range(2):
        assert torch.equal(functional.layer_norm(X), reference.layer_norm(X))
    tested, used = calls.count(False), calls.count(True)
    assert (tested, used) == (2 * selftest.SAMPLES, 2)
    assert recorded(tmp_path) == {"layer_norm, tensor, float32": {"right": True, "reason": ""}}
    # As in the next process.
    plant(layer_norm=counted(right("layer_norm"), calls))
    functional.layer_norm(X)
    assert calls.count(False) == tested


@pytest.mark.parametrize("fault", [wrong_norm, wrong_gradient])
def test_wrong_kernels_are_not_used(plant, tmp_path, fault):
    plant(layer_norm=fault)
    with pytest.warns(RuntimeWarning) as warned:
        y = functional.layer_norm(X)
    text = str(warned.pop().message)
    assert not warned
    assert text.startswith("fastconv: the triton kernels of layer_norm, tensor, float32 failed their self-test (")
    assert "at most 5.0e-06 is right). The portable backend runs instead" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "fastconv info" in text
    assert torch.equal(y, portable.layer_norm(X, NORM))
    found = recorded(tmp_path)["layer_norm, tensor, float32"]
    assert not found["right"]
    assert "error" in found["reason"]

    def sample():
        inputs = [torch.randn(3, 4, 5, 6)]
        return accuracy.compare(functional.layer_norm, reference.layer_norm, inputs, ["x"])

    # Silently from now on: what is raised fails the test.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_accurate(sample)
    # The next process knows, and warns again; one that forces them runs them.
    calls = []
    plant(layer_norm=counted(fault, calls))
    with pytest.warns(RuntimeWarning, match="failed their self-test"):
        functional.layer_norm(X)
    assert calls == []
    with fastconv.backend("triton"):
        functional.layer_norm(X)
    assert calls == [True]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "compiled"])
def test_wrong_native_kernels_are_not_used(plant, tmp_path, monkeypatch, graph):
    def use(key):
        plant("native", layer_norm=wrong_norm)
        found = Library(None, key, "g++ 12.2.0", None, True)
        monkeypatch.setattr(library, "describe", lambda: found)
        torch.compiler.reset()
        compiled = torch.compile(functional.layer_norm, fullgraph=True, backend="aot_eager")
        with pytest.warns(RuntimeWarning, match="the native kernels of layer_norm, tensor, float32 failed their"):
            y = (compiled if graph else functional.layer_norm)(X)
        torch.testing.assert_close(y, reference.layer_norm(X))

    for key in ("a", "a", "b"):
        use(key)
    # One for each library.
    assert len([*(tmp_path / "selftest").iterdir()]) == 2
    with fastconv.backend("native"):
        assert torch.equal(functional.layer_norm(X), wrong_norm(X, NORM))


def test_memory_that_runs_out_is_no_fault_of_the_kernels(plant, silent, tmp_path):
    def allocate(*_):
        if threading.current_thread() is threading.main_thread():
            return X
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    plant(layer_norm=allocate)
    assert functional.layer_norm(X) is X
    assert not list(tmp_path.iterdir())


def test_each_gelu_is_tested(plant):
    def wrong_tanh(x, conv, approximate):
        y = right("pointwise_conv_gelu")(x, conv, approximate)
        return y * 1.1 if approximate == "tanh" else y

    plant(pointwise_conv_gelu=wrong_tanh)
    weight = torch.rand(5, 4, 1, 1)
    functional.pointwise_conv_gelu(X, weight)
    with pytest.warns(RuntimeWarning, match="pointwise_conv_gelu, float32, GELU tanh failed their self-test"):
        y = functional.pointwise_conv_gelu(X, weight, approximate="tanh")
    torch.testing.assert_close(y, reference.pointwise_conv_gelu(X, weight, approximate="tanh"))


def test_other_operations_dtypes_and_norms_stay(plant, tmp_path):
    calls = []
    plant(layer_norm=wrong_norm, pointwise_conv_gelu=counted(right("pointwise_conv_gelu"), calls))
    with pytest.warns(RuntimeWarning, match="layer_norm, tensor, float32"):
        functional.layer_norm(X)
    with pytest.warns(RuntimeWarning, match="layer_norm, sample, bfloat16"):
        functional.layer_norm(X.bfloat16(), norm="sample")
    functional.pointwise_conv_gelu(X, torch.rand(5, 4, 1, 1))
    assert calls.count(True) == 1
    assert [found["right"] for found in recorded(tmp_path).values()] == [False, False, True]


def test_kernels_that_raise_are_wrong(plant, tmp_path):
    def fail(*_):
        raise RuntimeError("an illegal memory\naccess was encountered")

    plant(layer_norm=fail)
    with pytest.warns(RuntimeWarning, match="an illegal memory access was encountered"):
        y = functional.layer_norm(X)
    assert torch.equal(y, portable.layer_norm(X, NORM))
    assert not recorded(tmp_path)["layer_norm, tensor, float32"]["right"]


def test_large_maps_and_autocast_are_tested_by_themselves(plant, silent, tmp_path):
    plant()
    weight = torch.rand(4, 1, 3, 3)
    functional.depthwise_conv_layer_norm(X, weight)
    functional.depthwise_conv_layer_norm(torch.rand(1, 4, 17, 16), weight)
    with torch.autocast("cpu", torch.bfloat16):
        functional.convnext_block(**draw("convnext_block", Sizes(3, 4, 5, 6, 2, (3, 3))))
    assert list(recorded(tmp_path)) == [
        "depthwise_conv_layer_norm, tensor, float32",
        "depthwise_conv_layer_norm, tensor, float32, large maps",
        "convnext_block, tensor, bfloat16, maps in float32",
    ]


@pytest.mark.parametrize("operation", backends.OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pytorch_itself_is_right(plant, operation, dtype):
    subject = selftest.Subject(operation, "channel" if "norm" in operation else None, False, dtype, dtype)
    plant()
    assert selftest._judge("triton", subject, CPU, selftest.usual_sizes(subject)).right


def test_where_few_values_are_normalised_others_are_tested(plant, silent):
    plant()
    one = torch.rand(1, 1, 1, 1)
    for norm in functional.NORMS:
        functional.layer_norm(one, norm=norm)


def test_sizes_are_those_of_the_call_with_few_images():
    _, *parameters, norm_weight, norm_bias = draw("convnext_block", Sizes(1, 64, 1, 1, 2, (5, 5))).values()
    convolutions = [Convolution(*parameters[i : i + 2]) for i in (0, 2, 4)]
    norm = Norm("tensor", 1e-6, norm_weight, norm_bias)
    x = torch.empty(100, 64, 300, 500, device="meta").contiguous(memory_format=torch.channels_last)
    subject = selftest.Subject("convnext_block", "tensor", True, torch.float32, torch.float32)
    sizes = selftest.sizes_of(subject, x, (*convolutions, norm, "none"))
    others = [tuple(p.shape) for p in tensors_in(*sizes.values)]
    assert others == [tuple(p.shape) for p in (*parameters, norm_weight, norm_bias)]
    assert sizes.values[-2][:2] == ("tensor", 1e-6)
    assert sizes.channels_last
    images, channels, height, width = sizes.maps
    assert (images, channels) == (1, 64)
    assert height * width > LARGEST_TOEPLITZ_MAP
    assert 128 * height * width <= selftest.MOST_ELEMENTS


@pytest.mark.parametrize("setting", ["0", "off"])
def test_the_environment_turns_it_off(plant, monkeypatch, silent, tmp_path, setting):
    calls = []
    plant(layer_norm=counted(wrong_norm, calls))
    monkeypatch.setenv("FASTCONV_SELFTEST", setting)
    if setting == "0":
        functional.layer_norm(X)
        assert calls == [True]
    else:
        with pytest.raises(fastconv.BackendUnavailable, match="FASTCONV_SELFTEST is 'off'; expected 0, for no"):
            functional.layer_norm(X)
    assert not list(tmp_path.iterdir())


def test_proved_architectures_are_not_tested(plant, monkeypatch, silent, tmp_path):
    plant(layer_norm=wrong_norm)
    monkeypatch.setattr(selftest, "PROVED", frozenset({"cpu"}))
    assert torch.equal(functional.layer_norm(X), wrong_norm(X, NORM))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"verdicts": 3}', b'{"verdicts": {"a": 1}}', b"\xff\xfe"])
def test_a_corrupt_file_is_written_anew(plant, silent, content):
    plant()
    path = verdicts._path("triton", CPU)
    path.parent.mkdir()
    path.write_bytes(content)
    functional.layer_norm(X)
    assert verdicts.load("triton", CPU)["layer_norm, tensor, float32"].right
    assert [*path.parent.iterdir()] == [path]


def test_without_a_folder_to_write_to_the_verdict_is_that_of_a_process(plant, monkeypatch, silent, tmp_path):
    calls = []
    plant(layer_norm=counted(right("layer_norm"), calls))
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        functional.layer_norm(X)
    assert calls.count(False) == 2 * selftest.SAMPLES


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"the caller's mode saw {function}")


def test_nothing_of_the_callers_is_seen_or_changed(plant, silent, monkeypatch):
    seen = []

    def look(x, norm):
        y = definition.call("layer_norm", x, norm)
        if threading.current_thread() is not threading.main_thread():
            seen.append((x.dtype, y.dtype, y.is_inference(), str(torch.empty(0).device)))
        return y

    plant(layer_norm=look)
    state = torch.get_rng_state()
    monkeypatch.setattr(dispatch, "_call", lambda *_: None)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16), Functions():
            subject = selftest.Subject("layer_norm", "tensor", False, torch.float32, torch.float32)
            assert selftest.trusts("triton", subject, CPU, selftest.usual_sizes(subject))
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {(torch.float32, torch.float32, False, "cpu")}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_first_use_in_a_checkpoint(plant, silent):
    # It saves tensors for the backward, and counts them when it computes again.
    plant()
    x = X.clone().requires_grad_()
    y = checkpoint(functional.layer_norm, x, use_reentrant=False)
    expected = torch.autograd.grad(reference.layer_norm(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), expected)


def test_threads_test_once(plant, silent):
    calls = []
    plant(layer_norm=counted(right("layer_norm"), calls))
    start, tests = threading.Barrier(4), []
    worst = selftest._worst

    def work():
        start.wait()
        functional.layer_norm(X)

    selftest._worst = lambda *args: tests.append(args) or worst(*args)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        selftest._worst = worst
    assert len(tests) == 1


@pytest.mark.parametrize(("capturing", "task"), [(True, -1), (False, 3)], ids=["in a capture", "in a backward"])
def test_a_bad_moment_decides_nothing(plant, silent, monkeypatch, tmp_path, capturing, task):
    plant(layer_norm=wrong_norm)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: task)
    subject = selftest.Subject("layer_norm", "tensor", False, torch.float32, torch.float32)
    assert selftest.trusts("triton", subject, torch.device("cuda", 0), selftest.usual_sizes(subject)) is None
    assert selftest._TRUSTED == {}


def test_a_compiled_graph_is_tested_while_it_is_traced(plant):
    calls = []
    plant(layer_norm=counted(wrong_norm, calls))
    torch.compiler.reset()
    compiled = torch.compile(functional.layer_norm, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="layer_norm, tensor, float32 failed their self-test"):
        torch.testing.assert_close(compiled(X), reference.layer_norm(X))
    assert set(calls) == {False}
    torch.compiler.reset()
    plant()
    verdicts._path("triton", CPU).unlink()
    compiled = torch.compile(functional.layer_norm, fullgraph=True, backend="aot_eager")
    for images in (3, 2, 1):
        torch.testing.assert_close(compiled(X[:images]), reference.layer_norm(X[:images]))
    assert verdicts.load("triton", CPU)["layer_norm, tensor, float32"].right


def test_a_kernel_that_cannot_run_is_kept_out_of_graphs(plant):
    plant(layer_norm=refuse)
    torch.compiler.reset()
    compiled = torch.compile(functional.layer_norm, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="norm_forward of layer_norm cannot run: needs 131072 bytes"):
        torch.testing.assert_close(compiled(X), reference.layer_norm(X))


@pytest.mark.parametrize("setting", ["0", "1"])
def test_training_goes_on_without_a_kernel(plant, monkeypatch, setting):
    plant(convnext_block=refuse)
    monkeypatch.setenv("FASTCONV_SELFTEST", setting)
    losses = []
    for module in (fastconv.backend("auto"), fastconv.backend("reference")):
        torch.manual_seed(0)
        model = fastconv.ConvNextBlock(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with module, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(3):
                loss = model(X).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        if len(losses) == 3:
            (message,) = (str(warning.message) for warning in warned)
            assert message.startswith(
                "fastconv: Triton kernel norm_forward of convnext_block cannot run: needs 131072 bytes of shared "
                "memory, this GPU has 101376. The portable backend runs instead"
            )
    torch.testing.assert_close(losses[:3], losses[3:])


def test_a_forced_backend_says_which_kernel_cannot_run(plant):
    plant(layer_norm=refuse)
    with fastconv.backend("triton"), pytest.raises(fastconv.BackendUnavailable) as raised:
        functional.layer_norm(X)
    assert str(raised.value) == (
        'backend "triton" cannot run layer_norm: kernel norm_forward: needs 131072 bytes of shared memory, this '
        'GPU has 101376; use "auto", "portable" or "reference"'
    )


def test_info_reports_the_verdicts(plant, run, monkeypatch):
    plant(layer_norm=wrong_norm)
    functional.patch_conv(X, torch.rand(5, 4, 2, 2))
    with pytest.warns(RuntimeWarning):
        functional.layer_norm(X)
    facts = json.loads(run("info", "--json")[1])
    assert facts["kernels"] == {}
    monkeypatch.setattr(machine, "available_devices", lambda: {"cuda:0": "Tesla T4"})
    monkeypatch.setattr(machine, "gpu_name", lambda device: "cpu")
    monkeypatch.setattr(machine, "architecture", lambda device: "cpu")
    kernels = json.loads(run("info", "--json")[1])["kernels"]["cuda:0"]
    assert (kernels["status"], kernels["right"]) == ("tested at first use", ["patch_conv, float32"])
    (reason,) = kernels["wrong"].values()
    text = run("info")[1]
    assert "triton kernels on cuda:0, cpu: tested at first use\n  right: patch_conv, float32\n" in text
    assert f"  wrong: layer_norm, tensor, float32: {reason}; auto takes portable\n" in text
    monkeypatch.setenv("FASTCONV_SELFTEST", "0")
    assert json.loads(run("info", "--json")[1])["kernels"]["cuda:0"]["status"] == "not tested"


FIRST_USE = """
import sys
sys.path.insert(0, {tests!r})
import interpreter
interpreter.install()
import torch, fastconv
from fastconv.operations import backends, functional, selftest
selftest.MOST_IMAGES = selftest.SAMPLES = 1
backends.can_run = lambda *_: None
worst = selftest._worst
selftest._worst = lambda *args: print("tested") or worst(*args)
functional.layer_norm(torch.randn(2, 4, 3, 5))
"""


@pytest.mark.interpreted
def test_the_second_process_does_not_test_again(tmp_path):
    pytest.importorskip("triton")
    for expected in (["tested"], []):
        code = FIRST_USE.format(tests=str(Path(__file__).parents[1]))
        cache = {"FASTCONV_SELFTEST": "1", "FASTCONV_CACHE": str(tmp_path)}
        assert printed_by("-W", "error", "-c", code, **cache).split() == expected
    assert recorded(tmp_path)["layer_norm, tensor, float32"]["right"]


REFUSED = """
import sys, warnings
import torch, triton
import fastconv
sys.path.insert(0, {tests!r})
import faulty_kernels
from fastconv.operations import backends, functional
from fastconv.bench.tools import null_gpu
from fastconv.kernels.layer_norm import kernels as norm

norm.store_moments = faulty_kernels.{fault}
backends.can_run = lambda *_: None
x = torch.randn(8, 4, 16, 16, requires_grad=True)
with null_gpu.null_gpu(), warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for _ in range(2):
        y = functional.layer_norm(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    fastconv.backend("triton")
    try:
        functional.layer_norm(x)
    except fastconv.BackendUnavailable as error:
        print(error)
(warning,) = warned
print(warning.message)
fastconv.backend("portable")
assert torch.equal(y, functional.layer_norm(x))
assert torch.equal(gradient, torch.autograd.grad(functional.layer_norm(x).sum(), x)[0])
"""


@pytest.mark.parametrize(
    ("fault", "reason", "setting"),
    [
        ("store_nothing", "a planted fault", "1"),
        ("store_by_a_large_product", "out of resource: shared memory", "0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA driver is there")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_kernel_of_ours_that_cannot_run(tmp_path, fault, reason, setting):
    pytest.importorskip("triton")
    code = REFUSED.format(tests=str(Path(__file__).parents[1]), fault=fault)
    environment = {"FASTCONV_SELFTEST": setting, "FASTCONV_CACHE": str(tmp_path), "TRITON_INTERPRET": None}
    forced, warned = printed_by("-c", code, **environment).splitlines()
    assert forced.startswith('backend "triton" cannot run layer_norm: kernel norm_moments: ')
    assert reason in forced
    assert warned.startswith("fastconv: Triton kernel norm_moments of layer_norm cannot run: ")
    assert "The portable backend runs instead" in warned
