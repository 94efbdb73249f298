"""Files that other people made: what they are, and the error that refuses them."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

FILE, FOLDER, MISSING = "a file", "a folder", "missing"
_KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: FOLDER,
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class DataError(Exception):
    """A data set or an image that cannot be used.

    The message is one line: what was got, what was expected, what to do. Characters that would break it, as names
    of files may have them, are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return text as one line that any file takes: line breaks and the like, which names may have, are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def kind_of(path: Path) -> str:
    """Return in words what is at `path`, following links; only a FILE can be opened without waiting or harm.

    Raises:
        OSError: the system does not say, because a folder on the way may not be searched for example.
    """
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode), "not a file")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return "a broken link" if path.is_symlink() else MISSING
