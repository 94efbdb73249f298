"""Small data sets in each layout, image files written by hand, and the assertion that one is refused."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fastconv.training import cifar10, data

TRAIN_BATCHES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]
ALL_BATCHES = [*TRAIN_BATCHES, "test_batch"]
RECORDS = 4


@contextmanager
def refused(pattern: str) -> Iterator[None]:
    with pytest.raises(data.DataError, match=pattern) as caught:
        yield
    assert "\n" not in str(caught.value)


def random_batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Pixels [RECORDS, 3, 32, 32] and labels of every batch; between them the batches have every label."""
    numbers = np.random.default_rng(0)
    return {
        name: (
            numbers.integers(0, 256, (RECORDS, 3, 32, 32), dtype=np.uint8),
            [(number * RECORDS + record) % 10 for record in range(RECORDS)],
        )
        for number, name in enumerate(ALL_BATCHES)
    }


def assert_holds_random_batches(dataset: data.Dataset) -> None:
    batches = random_batches()
    for images, names in ((dataset.train, TRAIN_BATCHES), (dataset.test, ["test_batch"])):
        assert images.images.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert np.array_equal(images.images.numpy(), np.concatenate([batches[name][0] for name in names]))
        assert images.labels.tolist() == [label for name in names for label in batches[name][1]]
    assert dataset.classes == data.CIFAR10_CLASSES


class Trap:
    """Makes a directory when it is unpickled, as a hostile file could run anything."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def write_binary_version(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, (pixels, labels) in random_batches().items():
        records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))


class Python2Pickler(pickle.Pickler):
    """Spells a NumPy type as Python 2 did, whose pickles the official files are: 0 for False, 1 for True."""

    def reducer_override(self, obj: object) -> object:
        if isinstance(obj, np.dtype):
            kind, (code, *_), state = obj.__reduce__()
            return kind, (code, 0, 1), state
        return NotImplemented


def write_python_version(folder: Path) -> list[list[str]]:
    """Return name and MD5 of each batch, for `take_as_official`."""
    folder.mkdir(parents=True)
    checksums = []
    for name, (pixels, labels) in random_batches().items():
        content = io.BytesIO()
        Python2Pickler(content, protocol=2).dump({"data": pixels.reshape(RECORDS, 3072), "labels": labels})
        (folder / name).write_bytes(content.getvalue())
        checksums.append([name, hashlib.md5(content.getvalue()).hexdigest()])
    return checksums


def take_as_official(checksums: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the small versions of CIFAR-10 for the official ones."""
    monkeypatch.setattr(datasets.CIFAR10, "train_list", checksums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", checksums[5:])
    monkeypatch.setattr(cifar10, "_BINARY_RECORDS", RECORDS)


def write_image_folder(folder: Path) -> None:
    """Three and two training images, one and one test image of ape and bee, 5 pixels wide and 4 high."""
    numbers = np.random.default_rng(1)
    for name in (
        "train/bee/b.png",
        "train/bee/A.PNG",
        "train/ape/2.png",
        "train/ape/10.png",
        "train/ape/1.png",
        "test/ape/x.png",
        "test/bee/y.png",
    ):
        save(folder / name, numbers.integers(0, 256, (4, 5, 3), dtype=np.uint8))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def encoded(format: str, pixels: np.ndarray) -> bytes:
    """Pixels in a format of Pillow's."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def png(
    width: int,
    depth: int,
    colour_type: int,
    row: bytes,
    plte: bytes = b"",
    trns: bytes = b"",
    height: int = 1,
) -> bytes:
    """A PNG file that has one row, written by hand, so that no encoder stands between the bytes and the test."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
        + (chunk(b"PLTE", plte) if plte else b"")
        + (chunk(b"tRNS", trns) if trns else b"")
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def tiff(mode: str, width: int, rows: bytes, height: int = 1) -> bytes:
    file = io.BytesIO()
    Image.frombytes(mode, (width, height), rows).save(file, "TIFF")
    return file.getvalue()
