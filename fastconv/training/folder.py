"""The folder of a run: what is in it, and that one process at a time writes it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fastconv.files import WriteError, remove_partial, write_atomically

CHECKPOINT, CONFIG, METRICS, CURVES = FILES = ("checkpoint.pt", "config.json", "metrics.jsonl", "curves.png")
# The lock is released by the system when its process ends, however it ends. Who holds it cannot be read from it.
LOCK, OWNER = ".fastconv.lock", ".fastconv.owner"


class FolderError(Exception):
    """A folder that a run cannot use. The message is one line: what was got, and what to do."""


def check_new(folder: Path) -> None:
    """Raise FolderError if a new run in `folder` would replace a file."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"--out is {folder}, a file; give a directory")
    held = [name for name in FILES if os.path.lexists(folder / name)]
    if CHECKPOINT in held:
        raise FolderError(f"{folder} holds a run; go on with it by --resume, or give another --out")
    if held:
        raise FolderError(f"{folder} holds {', '.join(held)}, which a run would replace; give another --out")


def make(folder: Path | None, kind: str = "") -> Path:
    """Make `folder`, which may exist, or a new one in runs/, named after its kind and the time; return it."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
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
