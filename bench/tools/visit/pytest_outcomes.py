"""A plug-in of pytest that keeps the outcome of each test as soon as it is there, and counts compilations.

Outcomes are lines of JSON in the file that the environment variable FASTCONV_OUTCOMES names.
"""

from __future__ import annotations

import json
import os

import pytest

from . import compilations

VARIABLE = "FASTCONV_OUTCOMES"

compilations.count()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Workers of pytest-xdist report to the process that started them, which alone writes.
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    outcome = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "message": message(report),
        # pytest itself prints them at the end, to which a run that is stopped does not come.
        "traceback": report.longreprtext if report.failed else "",
    }
    with open(os.environ[VARIABLE], "a") as lines:
        print(json.dumps(outcome), file=lines)


def message(report: pytest.TestReport) -> str:
    """What a test found, or why it failed, in a line."""
    found = [f"{name}: {value}" for name, value in report.user_properties]
    crash = getattr(report.longrepr, "reprcrash", None)
    if report.failed:
        found.append(crash.message if crash is not None else str(report.longrepr))
    return " ".join(" ".join(found).split())
