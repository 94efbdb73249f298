"""Files that are complete at any moment, and the folder of those that are kept for later processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO


class WriteError(OSError):
    """A file that cannot be written. The message is one line: which file, why not, and what to do."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place in one step.

    Raises:
        WriteError: the disk is full, or the folder cannot be written. `path` is then as it was.
    """
    # Each process writes a file of its own. "x" refuses one that is there, and follows no link.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        # Outside of the inner try: what could not be opened is not ours to remove.
        file = open(temporary, "xb")  # noqa: SIM115
        try:
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own while it handles a file's OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise WriteError(_refused(path, cause)) from error


@contextmanager
def writing(path: Path) -> Iterator[IO[str]]:
    """Open a file to be written line by line, each of which is there at once.

    Raises:
        WriteError: the disk is full, or the file cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8", buffering=1) as file:
            yield file
    except OSError as error:
        raise WriteError(_refused(path, error)) from error


def _refused(path: Path, error: OSError) -> str:
    return f"{path} cannot be written: {error.strerror or error}; make room on its disk, or check its folder"


def remove_partial(path: Path) -> None:
    """Remove what a process that was killed while it wrote `path` left behind. No other may be writing it."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return the folder of fastconv in the user's cache; it need not exist.

    Raises:
        FileNotFoundError: the user has no home.
    """
    if given := os.environ.get("FASTCONV_CACHE"):
        return Path(os.path.expanduser(given))
    try:
        home = Path.home()
    except RuntimeError as error:
        raise FileNotFoundError("there is no home folder to keep files in; set FASTCONV_CACHE") from error
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "fastconv"
