"""Triton's cache of compiled kernels, carried from one machine to another in an archive.

Triton finds a kernel again by its source, what it was specialised for, and a hash of Triton's own files: not by
paths, nor by the version of Python. What it builds of C, as launchers, is found by the version of Python that
built it, and since Triton 3.8 by paths too, so that it is built anew elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key

from ... import results

TARGET = GPUTarget("cuda", 90, 32)
_MANIFEST = "manifest.json"
# Triton's lists of the files of a kernel, with absolute paths.
_GROUP = "__grp__"


def key() -> str:
    """What two machines must agree on to share kernels: Triton's own files, and its assembler's version."""
    return hashlib.sha256(f"{triton_key()} {make_backend(TARGET).hash()}".encode()).hexdigest()[:16]


def manifest() -> dict[str, Any]:
    """What an archive says of its origin."""
    return {
        "key": key(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **results.commit(),
    }


def entries(cache: Path) -> set[str]:
    """The names of what a cache holds: a folder for each kernel and each launcher."""
    return {path.name for path in cache.iterdir() if path.is_dir()} if cache.is_dir() else set()


def pack(cache: Path, archive: Path, without: Collection[str] = (), preset: int = 6) -> int:
    """Write the entries of a cache, but for those named in `without`, to a .tar.xz; return their number.

    Args:
        preset: of xz. Kernels resemble each other: 6 makes them half as large as 1, which takes seconds, does.
    """
    names = sorted(entries(cache).difference(without))
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Whoever finds the archive finds all of it.
    unfinished = archive.with_name(archive.name + ".tmp")
    with tarfile.open(unfinished, "w:xz", preset=preset) as tar:
        about = json.dumps(manifest(), indent=1).encode()
        header = tarfile.TarInfo(_MANIFEST)
        header.size = len(about)
        tar.addfile(header, io.BytesIO(about))
        for name in names:
            for path in sorted(path for path in (cache / name).iterdir() if path.is_file()):
                tar.add(path, f"{name}/{path.name}")
    os.replace(unfinished, archive)
    return len(names)


def read_manifest(archive: Path) -> dict[str, Any]:
    """What the archive says of its origin.

    Raises:
        ValueError: it is no archive of `pack`.
    """
    try:
        with tarfile.open(archive) as tar:
            member = tar.next()
            file = tar.extractfile(member) if member is not None and member.name == _MANIFEST else None
            if file is not None:
                return json.load(file)
    except (tarfile.TarError, EOFError, json.JSONDecodeError) as error:
        raise ValueError(f"{archive} is damaged ({error}); fill the cache again") from error
    raise ValueError(f"{archive} does not begin with {_MANIFEST}; expected an archive of compiled kernels")


def unpack(archive: Path, cache: Path) -> int:
    """Add the entries of an archive to a cache, for Triton to find there; return how many it then holds.

    Raises:
        ValueError: it is no archive of `pack`, or was made by another Triton, which would find nothing in it.
    """
    about, own = read_manifest(archive), manifest()
    if about["key"] != own["key"]:
        raise ValueError(
            f"{archive.name} has key {about['key']} of triton {about['triton']}; "
            f"expected {own['key']} of triton {own['triton']}: kernels are compiled anew"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    (cache / _MANIFEST).unlink()
    relocate(cache)
    return len(entries(cache))


def relocate(cache: Path) -> None:
    """Make a cache that was moved say where it lies now."""
    for group in cache.glob(f"*/{_GROUP}*"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.with_name(name)) for name in names}}))
