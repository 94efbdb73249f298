"""A plug-in of pytest that runs tests for a GPU without one, to compile their kernels; no outcome means anything.

It has to come before any conftest.py, in workers too: by the environment variable PYTEST_PLUGINS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import compilations
from .kernels_only import gpu_found, kernels_only

_session, _collection = contextlib.ExitStack(), contextlib.ExitStack()
_session.enter_context(kernels_only())
_collection.enter_context(gpu_found())
torch.testing.assert_close = lambda *_, **__: None
compilations.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Some test modules keep the device that they use there.
        if hasattr(item.module, "CUDA"):
            item.module.CUDA = "cpu"
        if (call := getattr(item, "callspec", None)) and call.params.get("device") == "cuda":
            call.params["device"] = "cpu"


def pytest_collection_finish() -> None:
    _collection.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    report = yield
    # What a test for a GPU cannot do here must not hide the kernels that it does launch. A kernel that does not
    # compile would not do so there either.
    if report.outcome == "failed" and call.excinfo is not None and call.excinfo.typename != "KernelError":
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"{call.excinfo.typename}: {str(call.excinfo.value)[:200]}")
    return report


def pytest_unconfigure() -> None:
    _session.close()
