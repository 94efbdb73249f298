"""Data sets are read exactly as their files have them, or refused in one line that says why."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from layouts import ALL_BATCHES, Trap, assert_holds_random_batches, png, refused, save
from PIL import Image
from torch.utils.data import random_split

from fastconv.extras import MissingPackage
from fastconv.training import data
from fastconv.training.images import read_image


def image_set(count: int) -> data.ImageSet:
    pixels = torch.arange(count * 3 * 4 * 5) % 256
    return data.ImageSet(pixels.to(torch.uint8).view(count, 3, 4, 5), torch.arange(count) + 100)


def test_subset_is_a_copy_in_the_given_order() -> None:
    images = image_set(5)
    part = images.subset(torch.tensor([4, 1]))
    assert len(part) == 2
    assert part.labels.tolist() == [104, 101]
    assert torch.equal(part.images, torch.stack([images.images[4], images.images[1]]))
    part.images.zero_()
    assert images.images[1].any()


@pytest.mark.parametrize(("count", "seed"), [(50_000, 55), (50_000, 0), (103, 55), (7, 55)])
def test_split_is_torchs_own(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    train, validation = random_split(range(count), [0.8, 0.2], generator=generator)
    for part, indices in zip((train, validation), data.split_indices(count, seed), strict=True):
        assert indices.dtype == torch.int64
        assert indices.tolist() == list(part.indices)


def test_split_of_the_lecture() -> None:
    train, validation = data.split_indices(50_000)
    assert (len(train), len(validation)) == (40_000, 10_000)
    # Literal, so that a change of torch's generator shows: results would not compare with the lecture's.
    assert train[:5].tolist() == [47037, 10342, 47311, 26318, 29081]
    assert validation[:5].tolist() == [21764, 40988, 27444, 20191, 22495]
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(50_000))


@pytest.fixture
def binary_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    layouts.take_as_official([], monkeypatch)
    folder = tmp_path / "cifar-10-batches-bin"
    layouts.write_binary_version(folder)
    return folder


@pytest.fixture
def python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "original" / "cifar-10-batches-py"
    layouts.take_as_official(layouts.write_python_version(folder), monkeypatch)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    layouts.write_image_folder(tmp_path)
    return tmp_path


@pytest.mark.parametrize("parent", [True, False], ids=["parent", "folder itself"])
def test_binary_version(binary_version: Path, parent: bool) -> None:
    dataset = data.load(binary_version.parent if parent else binary_version)
    assert_holds_random_batches(dataset)
    assert dataset.source == f"CIFAR-10, binary version (no checksums), {binary_version}"


def test_binary_version_of_full_size(tmp_path: Path) -> None:
    for name in ALL_BATCHES:
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(30_730_000)
    dataset = data.load(tmp_path)
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert dataset.test.images.shape == (10_000, 3, 32, 32)


@pytest.mark.parametrize("size", [0, 30_729_999, 30_730_001])
def test_binary_batch_of_the_wrong_size(tmp_path: Path, size: int) -> None:
    with open(tmp_path / "data_batch_1.bin", "wb") as file:
        file.truncate(size)
    with refused(rf"data_batch_1\.bin has {size:,} bytes; expected 30,730,000 \(10,000 records of 3,073\)"):
        data.load(tmp_path)


@pytest.mark.parametrize("name", ALL_BATCHES)
@pytest.mark.parametrize("label", [10, 255])
def test_binary_label_out_of_range(binary_version: Path, name: str, label: int) -> None:
    path = binary_version / f"{name}.bin"
    content = bytearray(path.read_bytes())
    content[2 * 3073] = label
    path.write_bytes(content)
    with refused(rf"{name}\.bin: record 2 has label {label}; expected 0 to 9"):
        data.load(binary_version.parent)


@pytest.mark.parametrize("name", ALL_BATCHES)
def test_binary_batch_missing(binary_version: Path, name: str) -> None:
    (binary_version / f"{name}.bin").unlink()
    with refused(rf"{name}\.bin is missing; expected data_batch_1\.bin to data_batch_5\.bin and test_batch"):
        data.load(binary_version.parent)


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "renamed"])
def test_python_version(python_version: Path, name: str) -> None:
    folder = python_version.rename(python_version.parent / name)
    dataset = data.load(folder if name == "renamed" else folder.parent)
    assert_holds_random_batches(dataset)
    assert dataset.source == f"CIFAR-10, Python version (checksums verified), {folder}"


def test_python_version_is_read_without_numpys_warning(
    python_version: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """NumPy 2.4.0 has one about the types in such old pickles; later versions do not."""
    original = pickle.loads

    def warn(content: bytes, **options: str) -> object:
        warnings.warn("dtype(): align should be passed as Python or NumPy boolean", stacklevel=2)
        return original(content, **options)

    monkeypatch.setattr(pickle, "loads", warn)
    assert_holds_random_batches(data.load(python_version.parent))
    assert not recwarn.list


@pytest.mark.parametrize("name", ALL_BATCHES)
def test_altered_file_is_refused_before_it_is_unpickled(python_version: Path, name: str) -> None:
    sprung = python_version.parent / "sprung"
    (python_version / name).write_bytes(pickle.dumps(Trap(sprung)))
    with refused(rf"cifar-10-batches-py: {name} has the wrong checksum; expected CIFAR-10's official"):
        data.load(python_version.parent)
    assert not sprung.exists()
    # The trap works: it would have been seen to spring.
    pickle.loads((python_version / name).read_bytes())
    assert sprung.exists()


def test_every_rejected_file_is_named(python_version: Path) -> None:
    (python_version / "data_batch_2").unlink()
    (python_version / "data_batch_3").unlink()
    (python_version / "data_batch_3").mkdir()
    with open(python_version / "test_batch", "ab") as file:
        file.write(b"\0")
    with refused("py: data_batch_2 is missing, data_batch_3 is a folder, test_batch has the wrong checksum;"):
        data.load(python_version.parent)


def test_python_version_comes_first(python_version: Path) -> None:
    layouts.write_binary_version(python_version.parent / "cifar-10-batches-bin")
    assert "Python version" in data.load(python_version.parent).source


def test_unreadable_cache(python_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "data_batch_1")

    # Root may read everything, so a mode of the file would not do.
    monkeypatch.setattr("builtins.open", deny)
    with refused("original cannot be read: .*Permission denied.*; check its files and their permissions"):
        data.load(cache=python_version.parent)


@pytest.mark.parametrize(("module", "read"), [("torchvision.datasets", data.load), ("PIL.Image", read_image)])
def test_missing_package(
    python_version: Path, monkeypatch: pytest.MonkeyPatch, module: str, read: Callable[[Path], object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"{module} cannot be imported .*; install it with: pip install \"fastconv\[train\]\"$"
    with pytest.raises(MissingPackage, match=message):
        read(python_version)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("missing", "missing is not a directory; give the one that holds the data set"),
        ("file", "file is not a directory"),
        (
            "empty",
            r"empty holds no data set; expected cifar-10-batches-py/, cifar-10-batches-bin/, or images in",
        ),
        # Which of the two it is depends on the Python version.
        pytest.param("long" * 500, "cannot be read: .*too long|is not a directory", id="long"),
    ],
)
def test_useless_directory(tmp_path: Path, name: str, pattern: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with refused(pattern):
        data.load(tmp_path / name)


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"])
@pytest.mark.parametrize("itself", [True, False], ids=["itself", "its folder"])
def test_archive_that_is_not_unpacked(tmp_path: Path, name: str, itself: bool) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    (folder / name).write_bytes(b"")
    with refused(rf"{name} is packed; unpack it with: tar -xzf '{folder}/{name}' -C '{folder}'$"):
        data.load(folder / name if itself else folder)


def test_home_of_nobody() -> None:
    with refused("^~nobody-of-this-name/data is not a directory"):
        data.load(Path("~nobody-of-this-name/data"))


def test_image_folder(image_folder: Path) -> None:
    for ignored in ("train/ape/.hidden.png", "train/ape/notes.txt", "train/.git/x", "train/README"):
        (image_folder / ignored).parent.mkdir(exist_ok=True)
        (image_folder / ignored).write_bytes(b"not an image")
    dataset = data.load(image_folder)

    # The same generator in the order the files were written, so no decoder is trusted.
    numbers = np.random.default_rng(1)
    b, a, ape_2, ape_10, ape_1, x, y = (
        numbers.integers(0, 256, (4, 5, 3), dtype=np.uint8).transpose(2, 0, 1) for _ in range(7)
    )
    assert dataset.classes == ("ape", "bee")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.train.images.dtype == torch.uint8
    assert np.array_equal(dataset.train.images.numpy(), np.stack([ape_1, ape_10, ape_2, a, b]))
    assert np.array_equal(dataset.test.images.numpy(), np.stack([x, y]))
    assert dataset.source == f"image folder, {image_folder}"


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "bmp", "gif", "ppm", "tif", "webp"])
def test_image_folder_of_other_formats(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "test"):
        for name in ("ape", "bee"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 8), (10, 130, 250)).save(folder / f"a.{suffix}", quality=100)
    images = data.load(tmp_path).test.images
    assert images.shape == (2, 3, 8, 16)
    colour = torch.tensor([10, 130, 250])[:, None, None]
    assert (images[0].int() - colour).abs().max() <= 2


def test_image_folder_of_odd_names(image_folder: Path) -> None:
    """A name is any bytes but a slash; sorted as Python sorts them."""
    names = ["[bold]", "a\nb", os.fsdecode(b"b\xff"), "c.png", "ü"]
    for split in ("train", "test"):
        for name in names[:-2]:
            shutil.copytree(image_folder / split / "ape", image_folder / split / name)
        (image_folder / split / "ape").rename(image_folder / split / names[-2])
        (image_folder / split / "bee").rename(image_folder / split / names[-1])
    dataset = data.load(image_folder)
    assert sorted(dataset.classes) == sorted(names)
    assert dataset.train.labels.bincount().tolist() == [
        len(list((image_folder / "train" / name).iterdir())) for name in dataset.classes
    ]


def test_image_folder_turned_by_exif(image_folder: Path) -> None:
    """The size that counts is that of the upright image."""
    path = image_folder / "train/ape/2.png"
    with Image.open(path) as image:
        stored = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # To be turned by 270 degrees.
        expected = np.asarray(image).transpose(2, 0, 1)
        stored.save(path, exif=exif)
    assert np.array_equal(data.load(image_folder).train.images[2], expected)


def remove_test(root: Path) -> None:
    shutil.rmtree(root / "test")


def remove_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def remove_classes(root: Path) -> None:
    shutil.rmtree(root / "test/ape")
    shutil.rmtree(root / "test/bee")


def rename_class(root: Path) -> None:
    (root / "test/bee").rename(root / "test/cat")


def empty_class(root: Path) -> None:
    (root / "test/bee/y.png").rename(root / "test/bee/y.txt")


def keep_one_class(root: Path) -> None:
    shutil.rmtree(root / "train/bee")
    shutil.rmtree(root / "test/bee")


def nest_images(root: Path) -> None:
    shutil.copytree(root / "train/ape", root / "train/ape/more")


def add_unclassed(root: Path) -> None:
    shutil.copy(root / "train/ape/1.png", root / "train/1.png")


def add_format(root: Path) -> None:
    shutil.copy(root / "train/ape/1.png", root / "train/ape/3.heic")


def break_link(root: Path) -> None:
    (root / "train/cat").symlink_to("nowhere")
    (root / "test/cat").symlink_to("nowhere")


def add_pipe(root: Path) -> None:
    os.mkfifo(root / "test/bee/z.png")


def resize_image(root: Path) -> None:
    save(root / "test/bee/y.png", np.zeros((5, 4, 3), dtype=np.uint8))


def inflate_image(root: Path) -> None:
    (root / "test/bee/y.png").write_bytes(png(8192, 1, 0, b"", height=8192))


def inflate_all(root: Path) -> None:
    for path in root.rglob("*.[pP]*"):
        path.write_bytes(png(8192, 1, 0, b"", height=8192))


def spoil_image(root: Path) -> None:
    (root / "train/ape/2.png").write_bytes(b"not an image")


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (remove_test, r"test is missing; expected images in train/<class>/ and test/<class>/"),
        (remove_train, r"train is missing; expected images in train/<class>/ and test/<class>/"),
        (remove_classes, r"test holds no class folders; expected images in .*test/<class>/"),
        (rename_class, r"train and .*test hold different classes: bee, cat in only one of them"),
        (empty_class, r"test/bee holds no image; expected PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM files"),
        (resize_image, r"bee/y\.png is 4 x 5 pixels; expected 5 x 4 as in .*train/ape/1\.png; resize"),
        (spoil_image, r"ape/2\.png is not an image; expected PNG, JPEG"),
        (keep_one_class, r"train holds one class, ape; expected two or more"),
        (nest_images, r"train/ape/more is a folder; expected the images of a class in .*/train/ape itself"),
        (add_unclassed, r"train/1\.png has no class; expected images in .*/train/<class>/"),
        (add_format, r"train/ape/3\.heic is called image/heic; expected PNG, JPEG, .*; convert or remove it"),
        (break_link, r"train/cat is a broken link; expected a folder of images"),
        (add_pipe, r"bee/z\.png is a named pipe; expected an image file"),
        (inflate_image, r"bee/y\.png is 8192 x 8192 pixels; expected 5 x 4"),
        (inflate_all, r"7 images of 8192 x 8192 pixels as .*1\.png take 1\.3 GiB; expected at most 0\.5, half"),
    ],
)
def test_useless_image_folder(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], pattern: str
) -> None:
    monkeypatch.setattr("fastconv.training.image_folder.memory", lambda device: 2**30)
    spoil(image_folder)
    with refused(pattern):
        data.load(image_folder)
