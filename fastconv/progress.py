"""A bar for work that is done in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(console: Console, total: int, otherwise_lines: bool = False) -> Iterator[Callable[[str], None]]:
    """Yield a function to call, with a description, after each step.

    On a terminal a bar shows the steps and the time that is left; elsewhere, if `otherwise_lines`, each is a line.
    """
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        # It would read markup, whatever the console does.
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)

        def advanced(done: str) -> None:
            bar.update(task, advance=1, description=done)
            if bar.disable and otherwise_lines:
                console.print(done, soft_wrap=True)

        yield advanced
