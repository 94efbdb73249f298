"""CIFAR-10, or any folder of images, as uint8 tensors that live on the training device.

CIFAR-10 is 184 MB as bytes, so it fits beside the model: batches are cut out of it where they are used, and
no loader processes, host copies or transforms stand between two training steps.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, random_split

from fastconv.extras import import_extra

if TYPE_CHECKING:
    from PIL.Image import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST_BATCH = "test_batch"
_PYTHON_FOLDER = "cifar-10-batches-py"
_BINARY_FOLDER = "cifar-10-batches-bin"
_BINARY_RECORDS = 10_000
# One label, then 32 x 32 pixels of red, of green and of blue.
_BINARY_RECORD_BYTES = 1 + 3 * 32 * 32


class DataError(Exception):
    """A data set that cannot be used.

    The message is one line: what was got, what was expected, what to do.
    """


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

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the set in batches, pixels scaled to [0, 1].

        Args:
            batch_size: images per batch; the last batch holds what is left.
            order: int64 [n], which images to visit and in what order, on the device of the set. None visits
                all as stored; the labels are then views of the set's.

        Yields:
            float32 images [n, 3, height, width] and int64 labels [n].

        Raises:
            ValueError: `batch_size` is less than 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        count = len(self) if order is None else len(order)
        for start in range(0, count, batch_size):
            window = slice(start, start + batch_size)
            chosen = window if order is None else order[window]
            yield self.images[chosen].float() / 255, self.labels[chosen]


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

    def checksum(self) -> str:
        """Return the SHA-256 of all shapes, pixels and labels, in hexadecimal; CIFAR-10 takes 0.3 s."""
        digest = hashlib.sha256()
        for tensor in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(import_extra("numpy").ascontiguousarray(tensor.cpu()))
        return digest.hexdigest()


def load(directory: Path | None = None, cache: Path | None = None) -> Dataset:
    """Load a data set onto the CPU.

    Args:
        directory: holds, in order of preference, CIFAR-10's Python version (`cifar-10-batches-py`), its
            binary version (`cifar-10-batches-bin`), or PNG and JPEG images, all of one size, in
            `train/<class>/` and `test/<class>/`. It may also be one of the two CIFAR-10 folders itself. None
            downloads CIFAR-10, with progress on stderr, unless `cache` has it.
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
            _download(place)
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


def read_image(path: Path) -> Image:
    """Read an image file of any size and mode as an 8-bit RGB Pillow image.

    EXIF orientation is applied, transparent pixels lie over white, and 16-bit grey is scaled down.

    Raises:
        DataError: `path` is missing, not an image, incomplete, or grey with floats or more than 16 bits.
        MissingPackage: Pillow is not installed.
    """
    pillow, pillow_ops = import_extra("PIL.Image"), import_extra("PIL.ImageOps")
    try:
        # An open file, because a path may be mapped into memory, and then Pillow turns TIFF images wrongly.
        with open(path, "rb") as file, pillow.open(file) as stored:
            image = _grey_to_8_bits(pillow_ops.exif_transpose(stored)).convert("RGBA")
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image; expected a format that Pillow reads") from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError and more for files that are not what they say.
    except Exception as error:
        # An error of the system names the path once more; its strerror does not.
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read as an image: {reason}; expected a complete image file") from error
    white = pillow.new("RGBA", image.size, "white")
    rgb: Image = pillow.alpha_composite(white, image).convert("RGB")
    return rgb


def pixels_of(image: Image) -> Tensor:
    """Return the pixels of an RGB image, uint8 [3, height, width]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def _load_directory(directory: Path) -> Dataset:
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; give the one that holds the data set")
    if folder := _find_version(directory, _PYTHON_FOLDER, suffix=""):
        return _load_python_version(folder)
    if folder := _find_version(directory, _BINARY_FOLDER, suffix=".bin"):
        return _load_binary_version(folder)
    if (directory / "train").is_dir() or (directory / "test").is_dir():
        return _load_image_folder(directory)
    raise DataError(
        f"{directory} holds no data set; expected {_PYTHON_FOLDER}/, {_BINARY_FOLDER}/, "
        "or images in train/<class>/ and test/<class>/"
    )


def _find_version(directory: Path, name: str, suffix: str) -> Path | None:
    """Return the folder of a CIFAR-10 version: `name` inside `directory`, or `directory` itself."""
    if (directory / name).is_dir():
        return directory / name
    # A single batch is enough to recognise a folder: that the others are missing is then said by name.
    if any((directory / (batch + suffix)).is_file() for batch in (*_TRAIN_BATCHES, _TEST_BATCH)):
        return directory
    return None


def _download(cache: Path) -> None:
    """Download CIFAR-10's Python version into `cache`, unless its folder is there."""
    folder = cache / _PYTHON_FOLDER
    if folder.is_dir():
        return
    cifar10 = import_extra("torchvision.datasets").CIFAR10
    print(f"downloading CIFAR-10 (170 MB) into {cache}", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the rename stays on one file system and is atomic.
        with TemporaryDirectory(prefix=".download-", dir=cache) as temporary:
            # Checks the archive's MD5 before extracting it, and each extracted file's after.
            cifar10(temporary, download=True)
            _publish(Path(temporary, _PYTHON_FOLDER), folder)
    except (OSError, HTTPException) as error:
        raise DataError(
            f"CIFAR-10 cannot be downloaded into {cache}: {error}; check the network and the disk, "
            "or pass --data DIR with a copy of it"
        ) from error
    except RuntimeError as error:
        raise DataError(
            f"the downloaded CIFAR-10 archive is corrupt ({error}); try again, "
            "or pass --data DIR with a copy of it"
        ) from error


def _publish(finished: Path, folder: Path) -> None:
    try:
        os.rename(finished, folder)
    except OSError:
        # Another process may have published its own, equally verified download in the meantime.
        if not folder.is_dir():
            raise


def _load_python_version(folder: Path) -> Dataset:
    cifar10 = import_extra("torchvision.datasets").CIFAR10
    # With no base folder of its own the class reads `folder` whatever its name.
    in_place: Any = type("CIFAR10InPlace", (cifar10,), {"base_folder": ""})
    try:
        # Unpickling runs what a file says. That is safe only because the class checks every MD5 first.
        train, test = in_place(folder, train=True), in_place(folder, train=False)
    except RuntimeError as error:
        raise DataError(
            f"{folder}: {_rejected_files(folder, cifar10)}; expected CIFAR-10's official Python version; "
            "remove the folder and download it again"
        ) from error
    return Dataset(
        train=_from_torchvision(train),
        test=_from_torchvision(test),
        classes=tuple(train.classes),
        source=f"CIFAR-10, Python version (checksums verified), {folder}",
    )


def _rejected_files(folder: Path, cifar10: Any) -> str:
    """Say which files torchvision refused and why; its own message does not."""
    check_integrity = import_extra("torchvision.datasets.utils").check_integrity
    expected = [*cifar10.train_list, *cifar10.test_list, (cifar10.meta["filename"], cifar10.meta["md5"])]
    return ", ".join(
        f"{name} has the wrong checksum" if (folder / name).is_file() else f"{name} is missing"
        for name, md5 in expected
        if not check_integrity(folder / name, md5)
    )


def _from_torchvision(dataset: Any) -> ImageSet:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(dataset.targets))


def _load_binary_version(folder: Path) -> Dataset:
    return Dataset(
        train=_read_binary_batches(folder, *_TRAIN_BATCHES),
        test=_read_binary_batches(folder, _TEST_BATCH),
        classes=CIFAR10_CLASSES,
        source=f"CIFAR-10, binary version (no checksums), {folder}",
    )


def _read_binary_batches(folder: Path, *names: str) -> ImageSet:
    records = torch.cat([_read_records(folder / f"{name}.bin") for name in names])
    return ImageSet(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long())


def _read_records(path: Path) -> Tensor:
    """Return the records of a batch, uint8 [records, bytes], with labels that are all of a class."""
    if not path.is_file():
        raise DataError(f"{path} is missing; expected data_batch_1.bin to data_batch_5.bin and test_batch.bin")
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


def _load_image_folder(directory: Path) -> Dataset:
    classes = _common_classes(directory / "train", directory / "test")
    train = _list_images(directory / "train", classes)
    test = _list_images(directory / "test", classes)
    # Read together, so that one check of the size covers both.
    images = _read_images([path for path, _ in train + test])
    labels = torch.tensor([label for _, label in train + test])
    count = len(train)
    return Dataset(
        train=ImageSet(images[:count], labels[:count]),
        test=ImageSet(images[count:], labels[count:]),
        classes=classes,
        source=f"image folder, {directory}",
    )


def _common_classes(train: Path, test: Path) -> tuple[str, ...]:
    """Return the sorted class names, which must be the same in both folders."""
    train_classes, test_classes = _class_names(train), _class_names(test)
    if unpaired := sorted(train_classes ^ test_classes):
        raise DataError(
            f"{train} and {test} hold different classes: {', '.join(unpaired)} in only one of them; "
            "give both the same class folders"
        )
    return tuple(sorted(train_classes))


def _class_names(split: Path) -> set[str]:
    if not split.is_dir():
        raise DataError(f"{split} is missing; expected images in train/<class>/ and test/<class>/")
    names = {entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if not names:
        raise DataError(f"{split} holds no class folders; expected images in {split}/<class>/")
    return names


def _list_images(split: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the image files of a split with their labels, class by class and sorted by name."""
    samples: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        # Some systems leave hidden files beside images, under the same suffix.
        visible = (path for path in (split / name).iterdir() if not path.name.startswith("."))
        paths = sorted(path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise DataError(f"{split / name} holds no image; expected {', '.join(IMAGE_SUFFIXES)} files")
        samples += [(path, label) for path in paths]
    return samples


def _read_images(paths: Sequence[Path]) -> Tensor:
    """Return images that must be of one size as uint8 [count, 3, height, width]."""
    images: list[Tensor] = []
    for path in paths:
        images.append(pixels_of(read_image(path)))
        (_, height, width), (_, expected_height, expected_width) = images[-1].shape, images[0].shape
        if (width, height) != (expected_width, expected_height):
            raise DataError(
                f"{path} is {width} x {height} pixels; expected {expected_width} x {expected_height} "
                f"as in {paths[0]}; resize all images to one size"
            )
    return torch.stack(images).contiguous()


def _grey_to_8_bits(image: Any) -> Any:
    """Scale 16-bit grey down, whose levels Pillow itself would clip; return other images as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    numpy = import_extra("numpy")
    levels = numpy.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"mode {image.mode} with levels {levels.min()} to {levels.max()} is not 16-bit grey")
    # A PNG may name one level as transparent, and scaling would merge it with its neighbours.
    levels = numpy.where(levels == image.info.get("transparency"), 65535, levels)
    return import_extra("PIL.Image").fromarray(numpy.rint(levels / 257).astype(numpy.uint8))
