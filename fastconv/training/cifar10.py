"""CIFAR-10's official files: the Python version, which has checksums, and the binary version.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastconv.extras import import_extra
from fastconv.training.inputs import FILE, DataError, kind_of

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PYTHON_FOLDER = "cifar-10-batches-py"
BINARY_FOLDER = "cifar-10-batches-bin"
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
BINARY_SUFFIX = ".bin"

# Images, uint8 [count, 3, 32, 32], and labels, int64 [count].
Batch = tuple[Tensor, Tensor]

_BINARY_RECORDS = 10_000
# One label, then 32 x 32 pixels of red, of green and of blue.
_BINARY_RECORD_BYTES = 1 + 3 * 32 * 32


def read_python_version(folder: Path) -> tuple[Batch, Batch]:
    """Return the training images and the test images of the Python version.

    Raises:
        DataError: a file is missing, or its MD5 is not the official one.
        MissingPackage: torchvision, which knows the checksums, or NumPy is not installed.
    """
    import_extra("numpy")  # The pickles import it.
    cifar10 = import_extra("torchvision.datasets").CIFAR10
    contents: dict[str, bytes] = {}
    faults = []
    for name, md5 in [*cifar10.train_list, *cifar10.test_list]:
        if (kind := kind_of(folder / name)) != FILE:
            faults.append(f"{name} is {kind}")
            continue
        with open(folder / name, "rb") as file:
            # More than a batch has; all of a file that is no batch may not fit into memory.
            contents[name] = file.read(2**25)
        if hashlib.md5(contents[name], usedforsecurity=False).hexdigest() != md5:
            faults.append(f"{name} has the wrong checksum")
    if faults:
        raise DataError(
            f"{folder}: {', '.join(faults)}; expected CIFAR-10's official Python version; "
            "remove the folder and download it again"
        )
    return _unpickle([contents[name] for name in TRAIN_BATCHES]), _unpickle([contents[TEST_BATCH]])


def _unpickle(contents: Sequence[bytes]) -> Batch:
    """Unpickle batches, which runs what they say: only their checksums make that safe."""
    with warnings.catch_warnings():
        # NumPy 2.4.0 warns of how these old pickles spell a type.
        warnings.simplefilter("ignore")
        batches = [pickle.loads(content, encoding="latin1") for content in contents]
    images = torch.cat([torch.from_numpy(batch["data"]) for batch in batches])
    return images.view(-1, 3, 32, 32), torch.tensor([label for batch in batches for label in batch["labels"]])


def read_binary_version(folder: Path) -> tuple[Batch, Batch]:
    """Return the training images and the test images of the binary version.

    Raises:
        DataError: a file is missing, or has another size or other labels than the official one.
    """
    return _read_records(folder, TRAIN_BATCHES), _read_records(folder, [TEST_BATCH])


def _read_records(folder: Path, names: Sequence[str]) -> Batch:
    records = torch.cat([_read_binary_batch(folder / f"{name}{BINARY_SUFFIX}") for name in names])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def _read_binary_batch(path: Path) -> Tensor:
    """Return the records of a batch, uint8 [records, bytes], with labels that are all of a class."""
    if (kind := kind_of(path)) != FILE:
        raise DataError(f"{path} is {kind}; expected data_batch_1.bin to data_batch_5.bin and test_batch.bin")
    size, expected = path.stat().st_size, _BINARY_RECORDS * _BINARY_RECORD_BYTES
    if size != expected:
        raise DataError(
            f"{path} has {size:,} bytes; expected {expected:,} "
            f"({_BINARY_RECORDS:,} records of {_BINARY_RECORD_BYTES:,}); copy or unpack it again"
        )
    # A bytearray, because a tensor over read-only bytes would be writable all the same.
    records = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    records = records.view(_BINARY_RECORDS, _BINARY_RECORD_BYTES)
    labels, highest = records[:, 0], len(CIFAR10_CLASSES) - 1
    wrong = (labels > highest).nonzero()
    if len(wrong) > 0:
        record = int(wrong[0])
        raise DataError(
            f"{path}: record {record} has label {int(labels[record])}; expected 0 to {highest}; "
            "copy or unpack it again"
        )
    return records
