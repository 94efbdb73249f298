"""The console that every command prints on."""

from __future__ import annotations

from typing import IO

from rich.console import Console


def console(
    stderr: bool = False, file: IO[str] | None = None, width: int | None = None, quiet: bool = False
) -> Console:
    """Return a console that prints strings as they are, or nothing if it is quiet.

    By default Rich reads "[a]" as markup and ":a:" as an emoji, and paths and names may hold both. For colour pass
    `style`, or a `rich.text.Text`. In a notebook Rich would not write to the file, but display HTML.
    """
    return Console(
        stderr=stderr,
        file=file,
        width=width,
        quiet=quiet,
        markup=False,
        emoji=False,
        highlight=False,
        force_jupyter=False,
    )
