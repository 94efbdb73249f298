"""The program `fastconv`: the commands in the modules beside this one, and those that packages register."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Annotated, Any, NoReturn

import typer

from fastconv import machine
from fastconv.commands import (
    check,
    compare,
    evaluate,
    info,
    notebook,
    predict,
    summary,
    swap_report,
    sweep,
    train,
)
from fastconv.extras import MissingPackage
from fastconv.graphs import CaptureError
from fastconv.operations import backends
from fastconv.training import checkpoint, data, folder, loop, ranks
from fastconv.training.inputs import printable
from fastconv.training.stepper import NonFinite

# Typer's, of which it exports only this kind.
USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Train the lecture's CIFAR-10 classifier with fused convolution modules, and use the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. Known errors become one line on standard error and exit code 2.

    Numbers that are not finite are a result, though not one to use: their exit code is 1.
    """
    # OSError is what a directory without permission raises; its text names the file.
    known = (
        data.DataError,
        checkpoint.CheckpointError,
        folder.FolderError,
        backends.BackendUnavailable,
        MissingPackage,
        CaptureError,
        ranks.LaunchError,
        OSError,
    )
    for stream in (sys.stdout, sys.stderr):
        # Tables and file names have characters that not every terminal's encoding has.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with termination():
            run()
    except ranks.RankFailed:
        ranks.leave(2)
    except ranks.RankLost as error:
        fail(error, 2, lost=True)
    except known as error:
        fail(error, 2)
    except NonFinite as error:
        fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if ranks.is_lost(error) and ranks.are_joined():
            fail(ranks.lost(error), 2, lost=True)
        if not machine.is_out_of_memory(error):
            raise
        fail("out of memory; give a smaller --batch-size, --width or --depth, or smaller images", 2)


def run() -> None:
    """Let Typer run the command. Its own errors are printed once, however many processes meet them."""
    if not ranks.are_launched():
        app()
        return
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as error:
        if ranks.are_joined():
            fail(error.format_message(), 2)
        # From torchrun all have the same arguments, and have met it.
        if ranks.is_first() or "TORCHELASTIC_RUN_ID" not in os.environ:
            error.show()
        sys.exit(2)
    sys.exit(code)


def fail(reason: object, code: int, lost: bool = False) -> NoReturn:
    """Print an error as `ranks.say` does, and end."""
    ranks.say(printable(str(reason)), lost)
    ranks.leave(code)


@contextmanager
def termination() -> Iterator[None]:
    """Let the signals that stop a program end it as an exception does, so that nothing half-written is left.

    The exit code is 143 for SIGTERM, as a shell reports it. Ctrl-C is Python's own exception.
    """

    def stop(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    ours = [number for number in loop.STOPPING if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@app.callback(invoke_without_command=True)
def callback(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        print(f"fastconv {machine.package_version('fastconv')}")
        raise typer.Exit


for command in (
    train.train,
    sweep.sweep,
    compare.compare,
    evaluate.evaluate,
    predict.predict,
    summary.summary,
    check.check,
    swap_report.swap_report,
    info.info,
    notebook.notebook,
):
    app.command()(command)
# Commands of packages that build on this one, such as fastconv.bench: pyproject.toml names them.
for entry in entry_points(group="fastconv.commands"):
    app.command(entry.name)(entry.load())
