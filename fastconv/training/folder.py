"""The folder of a run: what is in it, and that one process at a time writes it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fastconv.files import WriteError, remove_partial, write_atomically

CHECKPOINT, CONFIG, METRICS, CURVES = FILES = ("checkpoint.pt", "config.json", "metrics.jsonl", "curves.png")
# What makes a folder a sweep's.
PLAN = "sweep.json"
# The lock is released by the system when its process ends, however it ends. Who holds it cannot be read from it.
LOCK, OWNER = ".fastconv.lock", ".fastconv.owner"


class FolderError(Exception):
    """A folder that a run cannot use. The message is one line: what was got, and what to do."""


def check_new(folder: Path) -> None:
    """Raise FolderError if a new run in `folder` would replace a file, or hide the runs of a sweep."""
    held = held_in(folder, FILES)
    if CHECKPOINT in held:
        raise FolderError(f"{folder} holds a run; go on with it by --resume, or give another --out")
    if held:
        raise FolderError(
            f"{folder} holds {', '.join(held)}, which a run would replace; move it away, or give another --out"
        )
    if os.path.lexists(folder / PLAN):
        raise FolderError(f"{folder} holds a sweep; give another --out")


def held_in(folder: Path, names: Sequence[str]) -> list[str]:
    """Return which files are in a folder that is typed as --out and need not exist.

    Raises:
        FolderError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"--out is {folder}, a file; give a directory")
    return [name for name in names if os.path.lexists(folder / name)]


def make(folder: Path | None, kind: str = "") -> Path:
    """Make `folder`, which may exist, or a new one in runs/, named after its kind and the time; return it.

    Raises:
        FolderError: it cannot be made.
    """
    try:
        if folder is None:
            return _make_new(kind)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{error.filename} cannot be made: {error.strerror}; give another --out") from error
    return folder


def _make_new(kind: str) -> Path:
    base = Path("runs", f"{kind}-" * bool(kind) + time.strftime("%Y%m%d-%H%M%S"))
    base.parent.mkdir(exist_ok=True)
    number, new = 1, base
    while True:
        # Other runs may have started in this second.
        with suppress(FileExistsError):
            new.mkdir()
            return new
        number += 1
        new = base.with_name(f"{base.name}-{number}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only run in `folder`, and remove what a killed one left half-written.

    Raises:
        FolderError: another process, which the message names, is in it.
        WriteError: the folder cannot be written.
    """
    lock, owner = FileLock(folder / LOCK, timeout=0), folder / OWNER
    try:
        lock.acquire()
    # A Timeout is an OSError.
    except Timeout as error:
        raise FolderError(
            f"{folder} is in use by {_read(owner) or 'another process'}; wait until it ends, or give another --out"
        ) from error
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror}; check it") from error
    try:
        for name in (*FILES, OWNER):
            remove_partial(folder / name)
        text = f"process {os.getpid()} on {platform.node()}"
        write_atomically(owner, lambda file: file.write(text.encode()))
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def _read(owner: Path) -> str:
    try:
        return owner.read_text(errors="replace") if owner.is_file() else ""
    except OSError:
        return ""
