"""Runs a program that may be missing, fail or hang."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

TIMEOUT_SECONDS = 120.0


class Unavailable(Exception):
    """The CPU kernels cannot be compiled or loaded here. The message is one line: why not, and what to do."""


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with messages in English.

    Raises:
        Unavailable: it cannot be started, or does not end in time.
    """
    try:
        # In a group of its own, so that what a compiler starts ends with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"LC_ALL": "C"},
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be started: {error.strerror}; check CXX and PATH") from error
    with process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(
                    f"{command[0]} did not end within {TIMEOUT_SECONDS:.0f} s; name another compiler in CXX"
                ) from error
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def lines_of_failure(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a program that failed printed about it, or else how it ended."""
    if lines := done.stderr.strip().splitlines():
        return lines
    code = done.returncode
    return [f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"]
