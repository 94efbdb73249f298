"""Images of one size in `train/<class>/` and `test/<class>/`."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastconv.machine import memory
from fastconv.training.images import FORMAT_NAMES, decode, open_image, pixels_of, read_image, suffixes
from fastconv.training.inputs import FILE, FOLDER, DataError, kind_of

SPLITS = ("train", "test")
# Drawing the training and the validation images copies them.
LARGEST_PART_OF_MEMORY = 0.5


def read(directory: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """Return training images, test images, and the names of the classes.

    Images are uint8 [count, 3, height, width], with labels, int64 [count]: label i is the i-th name.

    Raises:
        DataError: the folder does not have the same classes, at least two, in both parts, or an image cannot be
            read, has no class, or is of another size than the first, or all together are too large.
        MissingPackage: Pillow is not installed.
    """
    folders = [directory / split for split in SPLITS]
    classes = _common_classes(*folders)
    train, test = (_labelled_images(folder, classes) for folder in folders)
    # Read together, so that one check of the size covers both.
    images = _read_images([path for path, _ in train + test])
    labels = torch.tensor([label for _, label in train + test])
    count = len(train)
    return (images[:count], labels[:count]), (images[count:], labels[count:]), classes


def _common_classes(train: Path, test: Path) -> tuple[str, ...]:
    """Return the sorted class names, which must be the same in both folders."""
    train_classes, test_classes = _class_names(train), _class_names(test)
    if unpaired := sorted(train_classes ^ test_classes):
        some = ", ".join(unpaired[:5]) + (", ..." if len(unpaired) > 5 else "")
        raise DataError(
            f"{train} and {test} hold different classes: {some} in only one of them; "
            "give both the same class folders"
        )
    if len(train_classes) == 1:
        raise DataError(
            f"{train} holds one class, {train_classes.pop()}; expected two or more to tell apart; "
            "add a folder of images for each other class"
        )
    return tuple(sorted(train_classes))


def _class_names(split: Path) -> set[str]:
    if (kind := kind_of(split)) != FOLDER:
        raise DataError(f"{split} is {kind}; expected images in train/<class>/ and test/<class>/")
    names = set()
    for path in _visible(split):
        if (kind := kind_of(path)) == FOLDER:
            names.add(path.name)
        elif kind != FILE:
            raise DataError(f"{path} is {kind}; expected a folder of images; remove it")
        elif _is_image(path):
            raise DataError(f"{path} has no class; expected images in {split}/<class>/")
    if not names:
        raise DataError(f"{split} holds no class folders; expected images in {split}/<class>/")
    return names


def _labelled_images(split: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the image files of a split with their labels, class by class and sorted by name."""
    samples: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        images = []
        for path in _visible(split / name):
            if _is_image(path):
                images.append((path, label))
            elif path.is_dir():
                raise DataError(f"{path} is a folder; expected the images of a class in {split / name} itself")
        if not images:
            raise DataError(f"{split / name} holds no image; expected {FORMAT_NAMES} files")
        samples += images
    return samples


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name, but for hidden files: some systems leave them beside images."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    """Return whether a file's name is that of an image.

    Raises:
        DataError: it is, of a format that is not read.
    """
    if path.suffix.lower() in suffixes():
        return True
    type_, _ = mimetypes.guess_type(path.name, strict=False)
    if type_ is not None and type_.startswith("image/"):
        raise DataError(f"{path} is called {type_}; expected {FORMAT_NAMES} files; convert or remove it")
    return False


def _read_images(paths: Sequence[Path]) -> Tensor:
    """Return images that must be of one size as uint8 [count, 3, height, width]."""
    with open_image(paths[0]) as first:
        _check_memory(paths, *first.size)
    size = width, height = read_image(paths[0]).size
    images = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)
    for i, path in enumerate(paths):
        with open_image(path) as stored:
            # Not decoded if it is too large. EXIF's orientation, which comes with the pixels, may swap the sides.
            image = decode(stored) if sorted(stored.size) == sorted(size) else stored
        if image.size != size:
            raise DataError(
                f"{path} is {image.width} x {image.height} pixels; expected {width} x {height} "
                f"as in {paths[0]}; resize all images to one size"
            )
        images[i] = pixels_of(image)
    return images


def _check_memory(paths: Sequence[Path], width: int, height: int) -> None:
    needed, available = 3 * len(paths) * width * height, memory(torch.device("cpu"))
    if available is not None and needed > LARGEST_PART_OF_MEMORY * available:
        raise DataError(
            f"{len(paths):,} images of {width} x {height} pixels as {paths[0]} take {needed / 2**30:,.1f} GiB; "
            f"expected at most {LARGEST_PART_OF_MEMORY * available / 2**30:,.1f}, half of this machine's memory; "
            "use fewer or smaller images"
        )
