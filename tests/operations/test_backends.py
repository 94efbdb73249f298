"""Forcing a backend, and what importing fastconv costs."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from processes import printed_by

import fastconv
from fastconv.kernels.cpu import library
from fastconv.operations import backends, dispatch, functional, portable, reference, setting

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def native(monkeypatch):
    """Make the CPU kernels load, or not for a reason; returns a list that notes each attempt."""
    attempts = []

    def install(reason=None):
        def load():
            attempts.append(reason)
            if reason is not None:
                raise library.Unavailable(reason)

        monkeypatch.setattr(library, "load", load)
        backends._native_refuses.cache_clear()
        return attempts

    yield install
    backends._native_refuses.cache_clear()


def test_auto_takes_native_kernels_in_float32_without_a_gpu(native):
    native()
    with fastconv.backend("auto"):
        for operation in backends.OPERATIONS:
            assert backends.select(operation, CPU, torch.float32) == "native"
            assert backends.select(operation, CPU, torch.float64) == "portable"
            # A block under autocast: its maps stay float32.
            assert backends.select(operation, CPU, torch.float32, torch.bfloat16) == "portable"
        assert backends.leaves_to_pytorch(torch.zeros(1, 1, 1, 1))


def test_auto_takes_the_portable_path_without_a_compiler(native):
    native("there is no C++ compiler")
    with fastconv.backend("auto"):
        for operation in backends.OPERATIONS:
            assert backends.select(operation, CPU, torch.float32) == "portable"
        assert backends.leaves_to_pytorch(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CPU, torch.float16, "its kernels take float32 only"),
        (CUDA, torch.float32, "it runs on CPUs, not on cuda"),
        (torch.device("meta"), torch.float32, "it runs on CPUs, not on meta"),
    ],
)
def test_native_kernels_are_not_compiled_for_what_they_do_not_take(native, device, dtype, reason):
    attempts = native()
    assert backends.can_run("native", device, dtype) == reason
    assert attempts == []


def test_native_kernels_are_asked_for_once(native, monkeypatch):
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    attempts = native("there is no C++ compiler: install one")
    with fastconv.backend("native"):
        for _ in range(2):
            with pytest.raises(fastconv.BackendUnavailable) as raised:
                functional.layer_norm(torch.zeros(1, 1, 1, 1))
    assert str(raised.value) == (
        'backend "native" cannot run layer_norm: there is no C++ compiler: install one; use "auto", "portable" or '
        '"reference"'
    )
    assert len(attempts) == 1


def test_the_environment_turns_native_kernels_off(native, monkeypatch):
    attempts = native()
    monkeypatch.setenv("FASTCONV_NATIVE", "0")
    assert backends.can_run("native", CPU, torch.float32) == "FASTCONV_NATIVE=0 turns it off"
    backends._native_refuses.cache_clear()
    monkeypatch.setenv("FASTCONV_NATIVE", "off")
    with pytest.raises(
        fastconv.BackendUnavailable, match=r"FASTCONV_NATIVE is 'off'; expected 0, for no kernels in C\+\+, or 1"
    ):
        backends.choose(CPU, torch.float32)
    assert attempts == []
    monkeypatch.setenv("FASTCONV_NATIVE", "1")
    assert backends.can_run("native", CPU, torch.float32) is None


def test_forced_backends_run(monkeypatch):
    called = []
    for module in (portable, reference):
        monkeypatch.setattr(module, "layer_norm", lambda x, *_, _m=module, **__: called.append(_m) or x)
    with fastconv.backend("reference"):
        functional.layer_norm(torch.zeros(1, 1, 1, 1))
    with fastconv.backend("portable"):
        functional.layer_norm(torch.zeros(1, 1, 1, 1))
    assert called == [reference, portable]


def test_the_context_manager_restores_and_the_function_stays():
    before = backends.current()
    with fastconv.backend("reference"):
        assert backends.current() == "reference"
        with fastconv.backend("portable"):
            assert backends.current() == "portable"
        assert backends.current() == "reference"
        fastconv.backend("auto")
        assert backends.current() == "auto"
    assert backends.current() == before


def test_an_error_inside_restores_too():
    before = backends.current()
    with pytest.raises(ZeroDivisionError), fastconv.backend("reference"):
        _ = 1 / 0
    assert backends.current() == before


def test_unknown_backend_changes_nothing():
    before = backends.current()
    with pytest.raises(ValueError, match="'cuda'; expected one of triton, native, portable, reference, auto"):
        fastconv.backend("cuda")
    assert backends.current() == before


@pytest.mark.parametrize(
    ("installed", "interpreted", "device", "reason"),
    [
        (False, True, "cpu", "Triton is not installed"),
        (True, False, "cpu", "on a CPU it needs TRITON_INTERPRET=1 in the environment"),
        (True, True, "meta", "it runs on GPUs of NVIDIA and AMD, not on meta"),
    ],
)
def test_forcing_triton_says_why_it_cannot_run(monkeypatch, installed, interpreted, device, reason):
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", installed)
    monkeypatch.setattr(backends, "_TRITON_INTERPRETED", interpreted)
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    with (
        fastconv.backend("triton"),
        pytest.raises(
            fastconv.BackendUnavailable, match=rf'"triton" cannot run layer_norm: {reason}.*; use "auto"'
        ),
    ):
        functional.layer_norm(torch.zeros(1, 1, 1, 1, device=device))


def test_the_interpreter_runs_only_if_it_is_forced(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(backends, "_TRITON_INTERPRETED", True)
    with fastconv.backend("auto"):
        assert "only if it is forced" in backends.can_run("triton", CPU, torch.float32)
    with fastconv.backend("triton"):
        assert backends.can_run("triton", CPU, torch.float32) is None


@pytest.fixture
def gpu(monkeypatch):
    """Make torch.cuda report a GPU of a compute capability."""
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.version, "hip", None)
    backends._gpu_refuses.cache_clear()

    def install(name, capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield install
    backends._gpu_refuses.cache_clear()


def test_a_t4_runs_float16_and_float32(gpu):
    gpu("Tesla T4", (7, 5))
    assert backends.choose(CUDA, torch.float16) == backends.choose(CUDA, torch.float32) == "triton"
    assert backends.choose(CUDA, torch.bfloat16) == backends.choose(CUDA, torch.float64) == "portable"
    # A block under autocast: its maps stay float32.
    assert backends.choose(CUDA, torch.float32, torch.bfloat16) == "portable"
    with fastconv.backend("triton"), pytest.raises(fastconv.BackendUnavailable) as raised:
        backends.select("convnext_block", CUDA, torch.float32, torch.bfloat16)
    assert str(raised.value) == (
        'backend "triton" cannot run convnext_block: Tesla T4 has compute capability 7.5, and bfloat16 needs 8.0 '
        'or newer: use float16, under autocast dtype=torch.float16; use "auto", "portable" or "reference"'
    )


def test_gpus_older_than_a_t4_run_portable(gpu):
    gpu("Tesla V100", (7, 0))
    assert backends.choose(CUDA, torch.float16) == "portable"
    reason = "Tesla V100 has compute capability 7.0; its kernels need 7.5 or newer"
    assert backends.can_run("triton", CUDA, torch.float16) == reason


def test_newer_gpus_run_all_but_float64(gpu):
    gpu("NVIDIA A100", (8, 0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert backends.choose(CUDA, dtype) == "triton"
    assert backends.choose(CUDA, torch.float64) == "portable"


@pytest.mark.parametrize(
    ("dtype", "autocast", "computed"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_the_dtype_that_counts_is_that_of_autocast(monkeypatch, dtype, autocast, computed):
    asked = []
    monkeypatch.setattr(backends, "can_run", lambda name, device, dtype: asked.append(dtype))
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    monkeypatch.setattr(dispatch, "_call", lambda *_: None)
    x, weight = torch.zeros(1, 2, 3, 3, dtype=dtype), torch.zeros(2, 2, 1, 1, dtype=dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        with fastconv.backend("portable"):
            functional.pointwise_conv_gelu(x, weight)
        assert set(asked) == {computed}
        asked.clear()
        backends.leaves_to_pytorch(x)
        assert set(asked) == {computed}


def test_the_environment_variable_forces_one():
    code = "from fastconv.operations import backends; print(backends.current())"
    assert printed_by("-c", code, FASTCONV_BACKEND="reference").strip() == "reference"
    assert printed_by("-c", code, FASTCONV_BACKEND="").strip() == "auto"


def test_a_wrong_environment_variable_is_named_when_it_is_used():
    with (
        setting.forced("fast"),
        pytest.raises(fastconv.BackendUnavailable, match="FASTCONV_BACKEND is 'fast'; expected one of triton"),
    ):
        functional.layer_norm(torch.zeros(1, 1, 1, 1))


def test_a_context_can_be_entered_again_and_within_itself():
    before = backends.current()
    context = fastconv.backend("reference")
    for _ in range(2):
        with context:
            assert backends.current() == "reference"
            with fastconv.backend("portable"):
                with context:
                    assert backends.current() == "reference"
                assert backends.current() == "portable"
            with context:
                pass
            assert backends.current() == "reference"
        assert backends.current() == before


def test_a_block_ends_with_what_was_forced_before_it():
    with fastconv.backend("reference"):
        # A function's setting that somebody keeps, as a notebook does.
        kept = fastconv.backend("portable")
        with fastconv.backend("auto"):
            # As where a generator was left in one context and goes on in another.
            contextvars.Context().run(kept.__exit__, None, None, None)
            assert backends.current() == "auto"
        assert backends.current() == "portable"
    assert backends.current() == "auto"


def test_threads_have_their_own_backend():
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = {}

    def first():
        with fastconv.backend("reference"):
            first_in.set()
            second_in.wait()
        first_out.set()
        seen["first"] = backends.current()

    def second():
        first_in.wait()
        seen["before"] = backends.current()
        with fastconv.backend("portable"):
            second_in.set()
            first_out.wait()
            seen["within"] = backends.current()
        seen["second"] = backends.current()

    with fastconv.backend("reference"), ThreadPoolExecutor(2) as threads:
        for done in threads.submit(first), threads.submit(second):
            done.result()
        assert backends.current() == "reference"
    assert seen == {"first": "auto", "before": "auto", "within": "portable", "second": "auto"}


def test_tasks_have_their_own_backend():
    async def work(name):
        seen = [backends.current()]
        with fastconv.backend(name):
            await asyncio.sleep(0)
            seen.append(backends.current())
            await asyncio.sleep(0)
        return [*seen, backends.current()]

    async def both():
        with fastconv.backend("reference"):
            found = await asyncio.gather(work("portable"), work("auto"))
        return found, backends.current()

    found, after = asyncio.run(both())
    assert found == [["reference", "portable", "reference"], ["reference", "auto", "reference"]]
    assert after == backends.current() == "auto"


def test_another_backend_makes_another_graph_in_each_thread():
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    x = torch.rand(2, 4, 6, 6)
    compiled = torch.compile(lambda x: functional.layer_norm(x), fullgraph=True, backend=keep)
    for _ in range(2):
        compiled(x)
        with fastconv.backend("reference"):
            compiled(x)
            # Its setting is "auto", whose graph there is.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(compiled, x).result()
    assert len(graphs) == 2
    assert graphs[0] != graphs[1]


def test_import_brings_in_no_triton_no_compiler_no_torchvision_and_no_cuda_context():
    code = """
import sys, torch
before = set(sys.modules)
import fastconv
from fastconv.kernels.common.values import Convolution, Norm
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print("fastconv.kernels.cpu" in sys.modules)
print(torch.cuda.is_initialized())
"""
    added, compiles, initialized = printed_by("-c", code).splitlines()
    assert added == "['fastconv']"
    assert compiles == initialized == "False"
