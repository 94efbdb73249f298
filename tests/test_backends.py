"""Forcing a backend, and what importing fastconv costs."""

import os
import subprocess
import sys

import pytest
import torch

import fastconv
from fastconv import backends, functional, portable, reference


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_auto_takes_the_portable_path_without_a_gpu():
    with fastconv.backend("auto"):
        for operation in backends.OPERATIONS:
            assert backends.select(operation, torch.zeros(1, 1, 1, 1)) is portable


def test_forced_backends_run(monkeypatch):
    called = []
    for module in (portable, reference):
        monkeypatch.setattr(module, "layer_norm", lambda x, _m=module, **_: called.append(_m) or x)
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
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of triton, portable, reference, auto"):
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
    x = torch.zeros(1, 1, 1, 1)
    with fastconv.backend("auto"):
        assert "only if it is forced" in backends.can_run("triton", x)
    with fastconv.backend("triton"):
        assert backends.can_run("triton", x) is None


def test_the_environment_variable_forces_one():
    code = "from fastconv import backends; print(backends.current())"
    assert run_python(code, FASTCONV_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code, FASTCONV_BACKEND="").stdout.strip() == "auto"


def test_a_wrong_environment_variable_is_named_when_it_is_used(monkeypatch):
    monkeypatch.setattr(backends, "_forced", "fast")
    with pytest.raises(fastconv.BackendUnavailable, match="FASTCONV_BACKEND is 'fast'; expected one of triton"):
        functional.layer_norm(torch.zeros(1, 1, 1, 1))


def test_a_context_can_be_entered_again():
    before = backends.current()
    context = fastconv.backend("reference")
    for _ in range(2):
        with context:
            assert backends.current() == "reference"
        assert backends.current() == before


def test_import_brings_in_no_triton_no_torchvision_and_no_cuda_context():
    code = """
import sys, torch
before = set(sys.modules)
import fastconv
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(torch.cuda.is_initialized())
"""
    added, initialized = run_python(code).stdout.splitlines()
    assert added == "['fastconv']"
    assert initialized == "False"
