"""What all tests share: the marks, the interpreter of Triton, the seed, and the command."""

import importlib.util
import math
import os
import signal
import sys

import pytest
import torch
from faults import stop_after_fault

# With a GPU the kernels run on it; without one, or if asked to, they are interpreted. This has to be decided
# before any test module can import Triton. Where there is none, as on macOS, the tests of kernels are skipped.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
# Tests of kernels test them anyway, and leave the user's cache as it is.
os.environ["FASTCONV_SELFTEST"] = "0"
if importlib.util.find_spec("triton") and INTERPRETED:
    import interpreter

    interpreter.install()
# These import the interpreter, by which each kernel that is imported later would be interpreted.
collect_ignore = [] if INTERPRETED else ["kernels/test_interpreter.py"]


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of the other way to run kernels: a skip is for what a reader could install."""
    other = "gpu" if INTERPRETED else "interpreted"
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker(other)])
    items[:] = [item for item in items if not item.get_closest_marker(other)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_interrupts():
    """A shell lets what it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _a_fault_on_the_gpu_is_this_tests(request):
    yield
    if torch.cuda.is_initialized():
        stop_after_fault(request)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device(request, monkeypatch):
    """Where Triton's kernels run; they are forced."""
    import fastconv

    # What PyTorch computes in float32 is to be float32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with fastconv.backend("triton"):
        yield request.param


@pytest.fixture
def poisoned():
    """New memory holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nothing_small(monkeypatch):
    """Keep small inputs, as those of tests are, on the portable path's own code."""
    from fastconv.operations import decisions

    monkeypatch.setattr(decisions, "SMALL_CONVOLUTION", 0)
    monkeypatch.setattr(decisions, "SMALL_BLOCK", 0)
    monkeypatch.setattr(decisions, "SMALL_BATCH_PIXELS_PER_IMAGE", math.inf)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command in this process; return its exit code, standard output and standard error."""
    # Not above: fastconv reads TRITON_INTERPRET when it is imported.
    import fastconv
    from fastconv.commands import main as cli
    from fastconv.operations import backends, dispatch

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastconv", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(backends, "_TRITON_INTERPRETED", False)
        monkeypatch.setattr(dispatch, "_CHOSEN", {})
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, fastconv.backend("auto"):
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call
