"""What all tests share: the marks, and the comparison with float64."""

import importlib.util

import pytest
import torch

# Before any test module can import Triton. Without it, as on macOS, the tests of kernels are skipped.
if importlib.util.find_spec("triton"):
    import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
