"""Data sets and images with one fault each, as a user gives them: one line says which, and nothing is written.

The faults are made by kinds: what is in a file's place, what is in a file, how folders are arranged, what the path
leads to. Each is a small data set that is right but for the one fault.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import layouts
import numpy as np
import pytest
import typer
from layouts import Trap, encoded, png, tiff

import fastconv
from fastconv.commands import main
from fastconv.training import cifar10

# Puts a fault where the path leads to.
Spoil = Callable[[Path], object]
# The fault in words, the path from the data set's folder, what spoils it, and the message: a regular expression.
Fault = tuple[str, str, Spoil, str]
Run = Callable[..., tuple[int, str, str]]
Data = Callable[[str], Path]
Warnings = pytest.WarningsRecorder

PIXELS = np.random.default_rng(2).integers(0, 256, (4, 5, 3), dtype=np.uint8)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def edit(change: Callable[[bytes], bytes], path: Path) -> None:
    path.write_bytes(change(path.read_bytes()))


def patch(position: int, layout: str, *values: int) -> Callable[[bytes], bytes]:
    packed = struct.pack(layout, *values)
    return lambda content: content[:position] + packed + content[position + len(packed) :]


def replace(make: Spoil, path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


def rename(name: str, path: Path) -> None:
    path.rename(path.with_name(name))


def make_huge(path: Path) -> None:
    """A file of 2 TB without content, which takes neither time nor disk."""
    os.truncate(path, 2**41)


# What may be in a file's place, and how it is called.
NO_FILES: dict[str, tuple[Spoil, str]] = {
    "nothing": (lambda path: None, "missing"),
    "folder": (Path.mkdir, "a folder"),
    "pipe": (os.mkfifo, "a named pipe"),
    "socket": (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "a socket"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "a broken link"),
    "link to itself": (lambda path: path.symlink_to(path.name), "a broken link"),
    "link through a file": (lambda path: path.symlink_to("/dev/null/nowhere"), "a broken link"),
}


def replacements(name: str, allowed: str = "") -> Iterator[tuple[str, Spoil, str]]:
    """What takes the place of `name` in words, the function that puts it there, and how a message calls it."""
    for kind, (make, called) in NO_FILES.items():
        if kind != allowed:
            yield f"{name}, {kind}", partial(replace, make), called


def faults_of_python_version() -> Iterator[Fault]:
    for name in ("data_batch_1", "test_batch"):
        for kind, spoil, called in replacements(name):
            yield kind, name, spoil, f"{name} is {called}; expected CIFAR-10's official Python version"
        for kind, spoil in {
            "empty": partial(write, b""),
            "cut short": partial(edit, lambda content: content[:-1]),
            "a byte more": partial(edit, lambda content: content + b"\0"),
            "another last byte": partial(edit, lambda content: content[:-1] + b"\0"),
            "2 TB": make_huge,
            "another batch": lambda path: shutil.copy(path.with_name("data_batch_2"), path),
            "trap": lambda path: write(pickle.dumps(Trap(path.with_name("sprung"))), path),
            "text": partial(write, b"<html>404</html>"),
        }.items():
            yield f"{name}, {kind}", name, spoil, f"{name} has the wrong checksum; expected CIFAR-10's official"


def faults_of_binary_version() -> Iterator[Fault]:
    for name in ("data_batch_5.bin", "test_batch.bin"):
        for kind, spoil, called in replacements(name):
            yield kind, name, spoil, f"{name} is {called}; expected data_batch_1.bin to data_batch_5.bin and"
        for kind, spoil, message in [
            ("empty", partial(write, b""), "has 0 bytes; expected 12,292"),
            ("cut short", partial(edit, lambda content: content[:-1]), "has 12,291 bytes"),
            ("a byte more", partial(edit, lambda content: content + b"\0"), "has 12,293 bytes"),
            ("2 TB", make_huge, "has 2,199,023,255,552 bytes"),
            ("an eleventh class", partial(edit, patch(0, "B", 10)), "record 0 has label 10; expected 0 to 9"),
            ("label 255", partial(edit, patch(3 * 3073, "B", 255)), "record 3 has label 255"),
        ]:
            yield f"{name}, {kind}", name, spoil, f"{name}:? {message}"


def sized(format: str, width: int, height: int) -> bytes:
    """An image whose header has another size, with the pixels of PIXELS."""
    if format == "PNG":
        return png(width, 1, 0, b"", height=height)
    if format == "PPM":
        return f"P6 {width} {height} 255\n".encode() + PIXELS.tobytes()
    content = encoded(format, PIXELS)
    if format == "JPEG":
        return patch(content.index(b"\xff\xc0") + 5, ">HH", height, width)(content)
    if format == "TIFF":
        tags = [content.index(struct.pack("<HHI", tag, 4, 1)) for tag in (256, 257)]
        return patch(tags[1] + 8, "<I", height)(patch(tags[0] + 8, "<I", width)(content))
    return patch({"GIF": 6, "BMP": 18}[format], {"GIF": "<HH", "BMP": "<ii"}[format], width, height)(content)


def images_that_cannot_be_read() -> Iterator[tuple[str, bytes, str]]:
    unknown = "is not an image; expected PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM$"
    for kind, content in {
        "empty": b"",
        "text": b"text\n" * 100,
        "page": b"<!DOCTYPE html><html>404</html>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "PDF": b"%PDF-1.7\n",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\n%%EndComments\nshowpage\n",
        "icon": encoded("ICO", PIXELS),
        "zip": b"PK\3\4" + bytes(100),
        "pickle": pickle.dumps(Trap(Path("sprung"))),
        "zeros": bytes(1000),
        "signature of a PNG": b"\x89PNG\r\n\x1a\n",
    }.items():
        yield kind, content, unknown
    incomplete = "cannot be read as an image: .*; expected a complete image file$"
    for format in FORMATS:
        content = encoded(format, PIXELS)
        yield f"half a {format}", content[: len(content) // 2], f"({incomplete}|{unknown})"
        yield f"{format} cut in its header", content[:14], f"({incomplete}|{unknown})"
    content = encoded("PNG", PIXELS)
    at = content.index(b"IDAT") + 6
    yield "PNG with a wrong stream", content[:at] + b"\xff" * 20 + content[at + 20 :], incomplete
    yield "PNG without pixels", png(5, 8, 2, b"", height=4), incomplete
    yield "PNG of no width", png(0, 8, 2, b""), f"({incomplete}|{unknown})"
    yield "PNG of no colour type", png(5, 8, 7, b""), f"({incomplete}|{unknown})"
    for format, width, height in [
        ("PNG", 2**31 - 1, 2**31 - 1),
        ("PNG", 13_000, 13_000),
        ("PNG", 8192, 8193),
        ("PNG", 2**26 + 1, 1),
        ("JPEG", 65_535, 65_535),
        ("JPEG", 8192, 8193),
        ("GIF", 65_535, 65_535),
        ("BMP", 2**31 - 1, 2**31 - 1),
        ("BMP", 10_000, 10_000),
        ("TIFF", 2**31, 2**31),
        ("TIFF", 10_000, 10_000),
        ("PPM", 10**9, 10**9),
        ("PPM", 10_000, 10_000),
    ]:
        yield (
            f"{format} of {width} x {height}",
            sized(format, width, height),
            r"has too many pixels \(.*\); expected at most 67,108,864; scale it down$",
        )
    for kind, mode, level, levels in [
        ("floats", "F", struct.pack("=f", 0.5), r"0\.5 to 0\.5"),
        ("NaN", "F", struct.pack("=f", math.nan), "nan to nan"),
        ("infinite", "F", struct.pack("=f", math.inf), "inf to inf"),
        ("17 bits", "I", struct.pack("=i", 65536), "65536 to 65536"),
        ("negative", "I", struct.pack("=i", -1), "-1 to -1"),
    ]:
        yield kind, tiff(mode, 5, 20 * level, height=4), f".* mode {mode} with levels {levels} is not 16-bit grey"
    yield "PFM", b"Pf\n5 4\n-1.0\n" + 20 * struct.pack("<f", 0.5), r".* mode F with levels 0\.5 to 0\.5 is not"


def faults_of_image_folder() -> Iterator[Fault]:
    for name in ("train/ape/1.png", "test/bee/y.png"):
        for kind, spoil, called in replacements(name, allowed="nothing"):
            yield kind, name, spoil, f"{name} is {called}; expected an image file$"
    for kind, content, message in images_that_cannot_be_read():
        yield kind, "train/ape/2.png", partial(write, content), rf"ape/2\.png {message}"
    for width, height in [(1, 1), (4, 5), (5, 5), (10, 8), (500, 400)]:
        content = encoded("PNG", np.zeros((height, width), dtype=np.uint8))
        message = rf"y\.png is {width} x {height} pixels; expected 5 x 4 as in .*ape/1\.png; resize all images"
        yield f"{width} x {height} among 5 x 4", "test/bee/y.png", partial(write, content), message
    for suffix in ("heic", "avif", "svg", "ico", "psd", "jp2"):
        message = rf"bee/c\.{suffix} is called image/.*; expected PNG, .* files; convert or remove it$"
        yield f"one more, .{suffix}", f"train/bee/c.{suffix}", Path.touch, message
    for split in ("train", "test"):
        for kind, spoil, called in replacements(split, allowed="folder"):
            yield kind, split, spoil, f"/{split} is {called}; expected images in train/<class>/ and test/<class>/$"
    for kind, (make, called) in NO_FILES.items():
        if kind not in ("nothing", "folder"):
            message = f"train/cow is {called}; expected a folder of images; remove it$"
            yield f"{kind} for a class", "train/cow", make, message
    yield "one class", "", keep_ape, "train holds one class, ape; expected two or more to tell apart"
    yield "no class", "train", partial(replace, Path.mkdir), "train holds no class folders; expected images in"
    yield "a class more", "test/cow", Path.mkdir, "different classes: cow in only one of them; give both the same"
    yield "names that differ", "test/ape", partial(rename, "Ape"), "different classes: Ape, ape in only one of"
    yield "many classes more", "test", add_99, r"different classes: 00, 01, 02, 03, 04, \.\.\. in only one of them"
    yield "empty class", "test/bee", partial(replace, Path.mkdir), "test/bee holds no image; expected PNG, JPEG"
    for name in (".y.png", "y.txt", "y"):
        yield f"only {name}", "test/bee/y.png", partial(rename, name), "test/bee holds no image; expected PNG"
    yield "nested", "train/ape/more", Path.mkdir, "ape/more is a folder; expected the images of a class in"
    yield "circle", "train/ape/up", lambda path: path.symlink_to(".."), "ape/up is a folder; expected the images"
    yield "without class", "test/y.png", Path.touch, r"test/y\.png has no class; expected images in .*/<class>/"
    yield "odd names", "", name_oddly, r"/\[red\]a\\nb\\x1b\[2Jc\\udcff/1\.png is not an image"


def keep_ape(root: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(root / split / "bee")


def add_99(split: Path) -> None:
    for i in range(99):
        (split / f"{i:02}").mkdir()


def name_oddly(root: Path) -> None:
    """Markup, a line break, a terminal's control sequence, and no UTF-8."""
    name = os.fsdecode(b"[red]a\nb\x1b[2Jc\xff")
    for split in ("train", "test"):
        rename(name, root / split / "ape")
    write(b"", root / "train" / name / "1.png")


def faults_of_the_folder() -> Iterator[Fault]:
    for kind, spoil, _ in replacements("data", allowed="folder"):
        yield kind, "", spoil, "data is not a directory; give the one that holds the data set$"
    nothing = "data holds no data set; expected cifar-10-batches-py/, cifar-10-batches-bin/, or images in"
    yield "empty", "", Path.exists, nothing
    for name in ("1.png", "cifar-10-batches-py", "cifar-10-batches-bin", "train"):
        yield f"file {name}", name, Path.touch, nothing
    yield "empty Python version", "cifar-10-batches-py", Path.mkdir, "data_batch_1 is missing, data_batch_2 is"
    yield "empty binary version", "cifar-10-batches-bin", Path.mkdir, r"data_batch_1\.bin is missing; expected"
    for name in cifar10.ARCHIVES:
        yield name, name, Path.touch, f"{name} is packed; unpack it with: tar -xzf .*/{name} -C .*/data$"


FAULTS = [
    pytest.param(layout, name, spoil, message, id=f"{layout}: {kind}")
    for layout, faults in [
        ("python", faults_of_python_version()),
        ("binary", faults_of_binary_version()),
        ("images", faults_of_image_folder()),
        ("nothing", faults_of_the_folder()),
    ]
    for kind, name, spoil, message in faults
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A folder with each layout, and the checksums of the Python version."""
    root = tmp_path_factory.mktemp("originals")
    checksums = layouts.write_python_version(root / "python")
    layouts.write_binary_version(root / "binary")
    layouts.write_image_folder(root / "images")
    (root / "nothing").mkdir()
    return root, checksums


@pytest.fixture(scope="module")
def command() -> object:
    """The program's commands: Typer takes longer to read their signatures than they take to refuse a data set."""
    return typer.main.get_command(main.app)


@pytest.fixture(scope="module")
def checkpoint(originals: tuple[Path, list[list[str]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run on the image folder."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = ["--epochs", "1", "--batch-size", "4", "--width", "4", "--depth", "1", "--patch", "2"]
    with fastconv.backend("auto"):
        main.app(["train", "--data", f"{originals[0]}/images", "--out", str(out), *options], standalone_mode=False)
    return out / "checkpoint.pt"


@pytest.fixture
def data(
    originals: tuple[Path, list[list[str]]], command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Data:
    """Makes a folder with a layout."""
    root, checksums = originals
    layouts.take_as_official(checksums, monkeypatch)
    monkeypatch.setattr(main, "app", command)
    return lambda layout: Path(shutil.copytree(root / layout, tmp_path / "data"))


@contextmanager
def nothing_is_written(folder: Path) -> Iterator[None]:
    before = sorted(folder.rglob("*"))
    yield
    assert sorted(folder.rglob("*")) == before


def assert_refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    line, rest = err.split("\n", 1)
    assert rest == ""
    assert line.startswith("fastconv: ")
    assert line.isprintable()
    assert re.search(message, line), line


@pytest.mark.parametrize(("layout", "name", "spoil", "message"), FAULTS)
def test_training_refuses(
    run: Run, data: Data, tmp_path: Path, recwarn: Warnings, layout: str, name: str, spoil: Spoil, message: str
) -> None:
    spoil(data(layout) / name)
    with nothing_is_written(tmp_path):
        result = run("train", "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert_refused(result, message)
    assert not recwarn.list


TOO_FEW = "4 training images leave none to validate on; expected 5 or more"


@pytest.mark.parametrize(
    ("layout", "name", "spoil", "message"),
    [*FAULTS[::20], pytest.param("images", "train/bee/b.png", Path.unlink, TOO_FEW, id="images: too few")],
)
def test_evaluation_refuses(
    run: Run, data: Data, checkpoint: Path, tmp_path: Path, layout: str, name: str, spoil: Spoil, message: str
) -> None:
    spoil(data(layout) / name)
    with nothing_is_written(tmp_path):
        result = run("evaluate", "--data", tmp_path / "data", "--checkpoint", checkpoint)
    assert_refused(result, message)


IMAGES = [(kind, make, f"is {called}; expected an image file$") for kind, (make, called) in NO_FILES.items()] + [
    (kind, partial(write, content), message) for kind, content, message in images_that_cannot_be_read()
]


@pytest.mark.parametrize(("make", "message"), [pytest.param(make, said, id=kind) for kind, make, said in IMAGES])
def test_prediction_refuses(
    run: Run, data: Data, checkpoint: Path, tmp_path: Path, recwarn: Warnings, make: Spoil, message: str
) -> None:
    right = data("images") / "test/bee/y.png"
    make(tmp_path / "image.png")
    with nothing_is_written(tmp_path):
        result = run("predict", "--checkpoint", checkpoint, right, tmp_path / "image.png")
    assert_refused(result, rf"image\.png {message}")
    assert not recwarn.list


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize(
    ("layout", "name"), [("python", "test_batch"), ("binary", "test_batch.bin"), ("images", "train/ape")]
)
def test_what_may_not_be_read(run: Run, data: Data, tmp_path: Path, layout: str, name: str) -> None:
    path = data(layout) / name
    path.chmod(0)
    result = run("train", "--data", tmp_path / "data", "--out", tmp_path / "run")
    path.chmod(0o700)
    assert_refused(result, f"data cannot be read: .*Permission denied: .*{name}'; check its files and their perm")
