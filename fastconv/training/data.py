"""CIFAR-10, or any folder of images, as uint8 tensors that live on the training device.

CIFAR-10 is 184 MB as bytes, so it fits beside the model: batches are cut out of it where they are used, and
no loader processes, host copies or transforms stand between two training steps.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, random_split

from fastconv.extras import import_extra
from fastconv.training import cifar10, image_folder
from fastconv.training.cifar10 import CIFAR10_CLASSES as CIFAR10_CLASSES
from fastconv.training.inputs import FILE, FOLDER, MISSING, kind_of
from fastconv.training.inputs import DataError as DataError


# Tensors have no single truth value, so a generated __eq__ would raise: sets compare by identity.
@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their labels, both on one device.

    Args:
        images: uint8 [count, 3, height, width].
        labels: int64 [count].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str) -> ImageSet:
        """Return this set on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def subset(self, indices: Tensor) -> ImageSet:
        """Return a copy of the images and labels at `indices`, int64 [n], in that order."""
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A training set and a test set over the same classes.

    Args:
        train: the images to train and validate on.
        test: the images to test on.
        classes: names; label i is `classes[i]`.
        source: for people: the layout that was read, and where.
        directory: the folder that `load` was given, as an absolute path; None for the downloaded CIFAR-10.
    """

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    source: str
    directory: str | None = None

    @cached_property
    def checksum(self) -> str:
        """The SHA-256 of all shapes, pixels and labels, in hexadecimal; CIFAR-10 takes 0.3 s."""
        digest = hashlib.sha256()
        for tensor in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(import_extra("numpy").ascontiguousarray(tensor.cpu()))
        return digest.hexdigest()


def load(directory: Path | None = None, cache: Path | None = None) -> Dataset:
    """Load a data set onto the CPU.

    Args:
        directory: holds, in order of preference, CIFAR-10's Python version (`cifar-10-batches-py`), its
            binary version (`cifar-10-batches-bin`), or images, all of one size, in `train/<class>/` and
            `test/<class>/`, in the formats of `images.FORMATS`. It may also be one of the two CIFAR-10 folders
            itself. None downloads CIFAR-10, with progress on stderr, unless `cache` has it.
        cache: where downloads are kept: by default the environment's FASTCONV_CACHE, else ~/.cache/fastconv.

    Raises:
        DataError: there is no such data set, or it is incomplete, altered or unreadable, or its download
            failed.
        MissingPackage: a package to read it with is not installed.
    """
    place = directory or cache or Path(os.environ.get("FASTCONV_CACHE") or "~/.cache/fastconv")
    # Path.expanduser raises for the home of a user there is not; this leaves such a path to be found missing.
    place = Path(os.path.expanduser(place))
    try:
        if directory is None:
            # Not at the top: it needs rich, which is not everywhere where kernels are measured.
            from fastconv.training.download import download

            download(place)
        found = _load_directory(place)
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error}; check its files and their permissions") from error
    return replace(found, directory=None if directory is None else os.path.abspath(place))


def split_indices(count: int, seed: int = 55) -> tuple[Tensor, Tensor]:
    """Return the lecture's 80/20 split of `count` images as int64 indices: training, then validation."""
    # random_split asks a data set for nothing but its length.
    parts = random_split(
        TensorDataset(torch.empty(count)), [0.8, 0.2], generator=torch.Generator().manual_seed(seed)
    )
    train, validation = (torch.tensor(part.indices, dtype=torch.int64) for part in parts)
    return train, validation


def _load_directory(directory: Path) -> Dataset:
    classes: tuple[str, ...] = CIFAR10_CLASSES
    if directory.name in cifar10.ARCHIVES and kind_of(directory) == FILE:
        raise DataError(_packed(directory))
    if kind_of(directory) != FOLDER:
        raise DataError(f"{directory} is not a directory; give the one that holds the data set")
    if folder := _find_version(directory, cifar10.PYTHON_FOLDER, suffix=""):
        train, test = cifar10.read_python_version(folder)
        source = f"CIFAR-10, Python version (checksums verified), {folder}"
    elif folder := _find_version(directory, cifar10.BINARY_FOLDER, suffix=cifar10.BINARY_SUFFIX):
        train, test = cifar10.read_binary_version(folder)
        source = f"CIFAR-10, binary version (no checksums), {folder}"
    elif any(kind_of(directory / split) == FOLDER for split in image_folder.SPLITS):
        train, test, classes = image_folder.read(directory)
        source = f"image folder, {directory}"
    elif archives := [directory / name for name in cifar10.ARCHIVES if (directory / name).exists()]:
        raise DataError(_packed(archives[0]))
    else:
        raise DataError(
            f"{directory} holds no data set; expected {cifar10.PYTHON_FOLDER}/, {cifar10.BINARY_FOLDER}/, "
            "or images in train/<class>/ and test/<class>/"
        )
    return Dataset(ImageSet(*train), ImageSet(*test), classes, source)


def _find_version(directory: Path, name: str, suffix: str) -> Path | None:
    """Return the folder of a CIFAR-10 version: `name` inside `directory`, or `directory` itself."""
    if kind_of(directory / name) == FOLDER:
        return directory / name
    # A single batch is enough to recognise a folder: that the others are missing is then said by name.
    batches = [directory / f"{batch}{suffix}" for batch in (*cifar10.TRAIN_BATCHES, cifar10.TEST_BATCH)]
    return directory if any(kind_of(batch) != MISSING for batch in batches) else None


def _packed(archive: Path) -> str:
    command = shlex.join(["tar", "-xzf", str(archive), "-C", str(archive.parent)])
    return f"{archive} is packed; unpack it with: {command}"
