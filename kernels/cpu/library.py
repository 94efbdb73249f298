"""The CPU kernels as a loaded library: compiled at first use, later taken from the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from . import cache, compiler, openmp
from .compiler import Compiler
from .processes import Unavailable as Unavailable
from .processes import lines_of_failure, run

SOURCES = Path(__file__).parent / "sources"
_LOCK = threading.Lock()
# Loads a library and computes something, in a process that an unknown instruction may kill.
_CHECK = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).fastconv_check())"


class Library(NamedTuple):
    """
    Args:
        functions: the kernels.
        key: a digest of all that decides what they compute: sources, compiler, flags and CPU.
        compiler: its name and version.
        path: where the library is kept; None if it could not be kept.
        parallel: whether it computes with torch's threads, and not with one.
    """

    functions: ctypes.CDLL
    key: str
    compiler: str
    path: Path | None
    parallel: bool


def load() -> ctypes.CDLL:
    """The kernels' functions. The first call may take seconds to compile, and reports it on standard error.

    Raises:
        Unavailable: they cannot be compiled or loaded; so does every later call in this process.
    """
    return describe().functions


def describe() -> Library:
    """As `load`, with what is known about the library."""
    with _LOCK:
        found = _first_use()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@functools.cache
def _first_use() -> Library | str:
    """The library, or why there is none."""
    try:
        return open_library(SOURCES)
    except Unavailable as error:
        return str(error)


def open_library(sources: Path) -> Library:
    """Load the library of all `.cpp` files in a folder, compiled unless it is in the cache.

    Raises:
        Unavailable: it can be neither compiled nor loaded.
    """
    found = compiler.find()
    functions = None
    try:
        key = _key(sources, found)
        if path := cache.find(key):
            # One that another machine with the same home kept may need a newer C library than there is.
            with suppress(OSError):
                functions = ctypes.CDLL(str(path))
        if functions is None:
            functions, path = _compile(sources, found, key)
    # Such as that of a disk that is full, or a library that needs a newer C++ library than torch has loaded.
    except OSError as error:
        raise Unavailable(
            f"its kernels cannot be loaded ({error}); set TMPDIR or FASTCONV_CACHE, or CXX"
        ) from error
    return Library(functions, key, found.name, path, openmp.connect(functions))


def _key(sources: Path, found: Compiler) -> str:
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(sources.iterdir())
        if path.suffix in (".cpp", ".h")
    }
    return hashlib.sha256(json.dumps([digests, found]).encode()).hexdigest()[:32]


def _compile(sources: Path, found: Compiler, key: str) -> tuple[ctypes.CDLL, Path | None]:
    """A new library, and where it is kept, if it can be."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastconv-") as scratch:
        fresh = Path(scratch) / "kernels.so"
        compiler.compile_sources(found, sorted(sources.glob("*.cpp")), fresh)
        kept = None
        try:
            kept = cache.keep(key, fresh.read_bytes(), _check)
            outcome = f"kept in {kept.parent}"
        except OSError as error:
            _check(fresh)
            outcome = f"not kept: {error}"
        functions = ctypes.CDLL(str(kept or fresh))
    seconds = time.perf_counter() - start
    print(f"fastconv: compiled the CPU kernels in {seconds:.1f} s ({found.name}; {outcome})", file=sys.stderr)
    return functions, kept


def _check(path: Path) -> None:
    """Raise Unavailable if a new library cannot be loaded, or has instructions that this CPU lacks."""
    # A program that embeds Python may not know where it is.
    done = run([sys.executable or "python3", "-I", "-S", "-c", _CHECK, str(path)])
    if done.returncode != 0:
        reason = lines_of_failure(done)[-1]
        raise Unavailable(
            f"its kernels, compiled for this CPU, fail on it ({reason}); name another compiler in CXX, or another "
            "folder in FASTCONV_CACHE"
        )
