"""The download of CIFAR-10: complete or not there, by one process at a time."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from filelock import FileLock, Timeout
from rich.progress import wrap_file

from fastconv.console import console
from fastconv.extras import import_extra
from fastconv.training.cifar10 import PYTHON_FOLDER
from fastconv.training.inputs import FOLDER, MISSING, DataError, kind_of

# A server that sends nothing for so long has stalled.
TIMEOUT_SECONDS = 60.0


def download(cache: Path) -> None:
    """Download the Python version into `cache`, with progress on stderr, unless its folder is there.

    The folder appears in one step, complete. One process downloads at a time; others wait for it.

    Raises:
        DataError: the download failed, or something else has the folder's name.
        MissingPackage: torchvision is not installed.
    """
    folder = cache / PYTHON_FOLDER
    if (kind := kind_of(folder)) == FOLDER:
        return
    if kind != MISSING:
        raise DataError(f"{folder} is {kind}; expected the folder of CIFAR-10; remove it to download CIFAR-10")
    cifar10 = import_extra("torchvision.datasets").CIFAR10
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache):
            if not folder.is_dir():
                _fetch(cifar10, cache)
    except (OSError, HTTPException) as error:
        raise DataError(
            f"CIFAR-10 cannot be downloaded into {cache}: {error}; check the network and the disk, "
            "or pass --data DIR with a copy of it"
        ) from error


def _fetch(cifar10: Any, cache: Path) -> None:
    utils = import_extra("torchvision.datasets.utils")
    print(f"downloading CIFAR-10 (170 MB) into {cache}", file=sys.stderr)
    # Inside the cache, so that the rename stays on one file system and is atomic. What a kill left there goes.
    temporary = cache / ".download"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        archive = temporary / cifar10.filename
        with urlopen(cifar10.url, timeout=TIMEOUT_SECONDS) as answer, open(archive, "wb") as file:
            size, bar = answer.length or 0, console(stderr=True)
            with wrap_file(answer, size, description="", console=bar) as shown:
                shutil.copyfileobj(shown, file)
        if not utils.check_integrity(archive, cifar10.tgz_md5):
            raise DataError(
                f"the archive from {cifar10.url} has the wrong checksum; try again, "
                "or pass --data DIR with a copy of CIFAR-10"
            )
        utils.extract_archive(str(archive), str(temporary))
        os.rename(temporary / PYTHON_FOLDER, cache / PYTHON_FOLDER)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Wait until no other process downloads into `cache`, and keep others out; a kill lets them in."""
    lock = FileLock(cache / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process downloads CIFAR-10 into {cache}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
