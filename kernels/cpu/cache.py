"""Compiled libraries in the user's cache folder.

A library is code that this process will run. So it is taken only if its seal, a digest at its end, shows that it
is whole and the one that was asked for, and if no other user can have written it. Files are replaced in one step
and never written in place: a process may have mapped them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fastconv.files import cache_folder, write_atomically

SEAL_BYTES = hashlib.sha256().digest_size


def find(key: str) -> Path | None:
    """Return the library that was kept under `key`; None if there is none that can be trusted."""
    try:
        path = _path(key)
        if not _is_ours_alone(path.parent.lstat()):
            return None
        with open(path, "rb", opener=_open_no_link) as file:
            if not _is_ours_alone(os.fstat(file.fileno())):
                return None
            content = file.read()
    except OSError:
        return None
    library, seal = content[:-SEAL_BYTES], content[-SEAL_BYTES:]
    return path if seal == _seal(key, library) else None


def keep(key: str, library: bytes, check: Callable[[Path], None]) -> Path:
    """Keep a library, unless `check` of its file raises; return its path.

    Raises:
        OSError: it cannot be kept. The message is one line, and names the folder.
    """
    path = _path(key)
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not _is_ours_alone(path.parent.lstat()):
        raise PermissionError(f"{path.parent} can be written by other users; remove it, or set FASTCONV_CACHE")

    def write(file: BinaryIO) -> None:
        os.fchmod(file.fileno(), 0o600)
        # The loader ignores what follows the library.
        file.write(library + _seal(key, library))
        file.flush()
        check(Path(file.name))

    write_atomically(path, write)
    return path


def _path(key: str) -> Path:
    return cache_folder() / "native" / f"{key}.so"


def _seal(key: str, library: bytes) -> bytes:
    return hashlib.sha256(key.encode() + library).digest()


def _is_ours_alone(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
