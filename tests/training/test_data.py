"""Data sets and images are read exactly as their files have them, or refused in one line that says why."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import socket
import struct
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import random_split
from torchvision import datasets

from fastconv.extras import MissingPackage
from fastconv.training import data

TRAIN_BATCHES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]
ALL_BATCHES = [*TRAIN_BATCHES, "test_batch"]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
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


def assert_holds(dataset: data.Dataset, batches: dict[str, tuple[np.ndarray, list[int]]]) -> None:
    for images, names in ((dataset.train, TRAIN_BATCHES), (dataset.test, ["test_batch"])):
        assert images.images.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert np.array_equal(images.images.numpy(), np.concatenate([batches[name][0] for name in names]))
        assert images.labels.tolist() == [label for name in names for label in batches[name][1]]
    assert dataset.classes == tuple(CLASSES)


def image_set(count: int) -> data.ImageSet:
    pixels = torch.arange(count * 3 * 4 * 5) % 256
    return data.ImageSet(pixels.to(torch.uint8).view(count, 3, 4, 5), torch.arange(count) + 100)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("order", [None, [9, 0, 3, 3, 7], list(range(9, -1, -1))])
def test_batches_follow_the_order(batch_size: int, order: list[int] | None) -> None:
    images = image_set(10)
    visited = list(range(10)) if order is None else order
    batches = list(images.batches(batch_size, None if order is None else torch.tensor(order)))

    sizes = [len(labels) for _, labels in batches]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= batch_size
    assert [int(label) for _, labels in batches for label in labels] == [100 + index for index in visited]
    pixels = torch.cat([batch for batch, _ in batches])
    assert pixels.dtype == torch.float32
    expected = np.stack([images.images[index].numpy() for index in visited]).astype(np.float32)
    assert np.array_equal(pixels.numpy(), expected / np.float32(255))


def test_batches_scale_every_byte_exactly() -> None:
    images = data.ImageSet(torch.arange(256).to(torch.uint8).view(1, 1, 16, 16), torch.zeros(1).long())
    ((pixels, _),) = images.batches(1)
    assert pixels.flatten().tolist() == [float(np.float32(level) / np.float32(255)) for level in range(256)]
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_batches_visit_every_image_once() -> None:
    order = torch.randperm(103, generator=torch.Generator().manual_seed(0))
    seen = torch.cat([labels for _, labels in image_set(103).batches(10, order)])
    assert torch.equal(seen.sort().values, torch.arange(103) + 100)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_need_a_size(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; expected at least 1"):
        next(image_set(3).batches(batch_size))


def test_empty_set_has_no_batches() -> None:
    assert list(image_set(3).batches(2, torch.empty(0, dtype=torch.int64))) == []


def test_subset_is_a_copy_in_the_given_order() -> None:
    images = image_set(5)
    part = images.subset(torch.tensor([4, 1]))
    assert len(part) == 2
    assert part.labels.tolist() == [104, 101]
    assert torch.equal(part.images, torch.stack([images.images[4], images.images[1]]))
    part.images.zero_()
    assert images.images[1].any()


def test_batches_stay_on_the_device() -> None:
    # The meta device stands for an accelerator: it has no pixels, so a detour over the CPU would raise.
    images = image_set(5).to("meta")
    for pixels, labels in images.batches(2, torch.randperm(5, device="meta")):
        assert (pixels.device.type, labels.device.type) == ("meta", "meta")


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
    monkeypatch.setattr(data, "_BINARY_RECORDS", RECORDS)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, (pixels, labels) in random_batches().items():
        records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    return folder


@pytest.mark.parametrize("parent", [True, False], ids=["parent", "folder itself"])
def test_binary_version(binary_version: Path, parent: bool) -> None:
    dataset = data.load(binary_version.parent if parent else binary_version)
    assert_holds(dataset, random_batches())
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


class Trap:
    """Makes a directory when it is unpickled, as a hostile file could run anything."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Python version, whose checksums torchvision's class takes for the official ones."""
    folder = tmp_path / "original" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    checksums = [
        [name, write(name, {"data": pixels.reshape(RECORDS, 3072), "labels": labels})]
        for name, (pixels, labels) in random_batches().items()
    ]
    meta = {
        "filename": "batches.meta",
        "key": "label_names",
        "md5": write("batches.meta", {"label_names": CLASSES}),
    }
    monkeypatch.setattr(datasets.CIFAR10, "train_list", checksums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", checksums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return folder


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "renamed"])
def test_python_version(python_version: Path, name: str) -> None:
    folder = python_version.rename(python_version.parent / name)
    dataset = data.load(folder if name == "renamed" else folder.parent)
    assert_holds(dataset, random_batches())
    assert dataset.source == f"CIFAR-10, Python version (checksums verified), {folder}"


@pytest.mark.parametrize("name", [*ALL_BATCHES, "batches.meta"])
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
    (python_version / "batches.meta").unlink()
    with open(python_version / "test_batch", "ab") as file:
        file.write(b"\0")
    with refused("py: data_batch_2 is missing, test_batch has the wrong checksum, batches.meta is missing;"):
        data.load(python_version.parent)


def test_python_version_comes_first(python_version: Path, binary_version: Path) -> None:
    binary_version.rename(python_version.parent / binary_version.name)
    assert "Python version" in data.load(python_version.parent).source


@pytest.fixture
def server(python_version: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A web server of the small Python version's archive, which torchvision takes for the official one."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(python_version, arcname=python_version.name)
    body = archive.getvalue()
    state = SimpleNamespace(status=200, body=body, length=len(body), requests=0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            self.send_response(state.status)
            self.send_header("Content-Length", str(state.length))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{http.server_port}/cifar.tar.gz")
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(body).hexdigest())
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def test_download_once(server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "not" / "yet" / "there"
    dataset = data.load(cache=cache)
    assert_holds(dataset, random_batches())
    assert [path.name for path in cache.iterdir()] == ["cifar-10-batches-py"]
    progress = capsys.readouterr()
    assert f"downloading CIFAR-10 (170 MB) into {cache}" in progress.err
    assert "100" in progress.err.rsplit("\r", 1)[-1]
    assert progress.out == ""

    requests = server.requests
    assert requests > 0
    assert_holds(data.load(cache=cache), random_batches())
    assert server.requests == requests
    assert capsys.readouterr().err == ""


def test_cache_of_the_environment(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTCONV_CACHE", "~/named")
    data.load()
    assert (tmp_path / "named/cifar-10-batches-py").is_dir()
    monkeypatch.delenv("FASTCONV_CACHE")
    data.load()
    assert (tmp_path / ".cache/fastconv/cifar-10-batches-py").is_dir()


def test_directory_is_not_downloaded_into(server: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused("empty holds no data set"):
        data.load(tmp_path / "empty")
    assert server.requests == 0


def not_found(server: SimpleNamespace) -> None:
    server.status = 404


def alter(server: SimpleNamespace) -> None:
    server.body = server.body[:-1] + bytes([server.body[-1] ^ 1])


def cut_short(server: SimpleNamespace) -> None:
    server.body = server.body[: len(server.body) // 2]


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (not_found, r"CIFAR-10 cannot be downloaded into .*404.*; check the network and the disk"),
        (alter, r"the downloaded CIFAR-10 archive is corrupt \(File not found or corrupted\.\); try again"),
        # Some versions of Python notice that the answer is cut short; for the others the checksum shows it.
        (cut_short, r"CIFAR-10 (cannot be downloaded|archive is corrupt)"),
    ],
)
def test_failed_download_leaves_nothing(
    server: SimpleNamespace, tmp_path: Path, spoil: Callable[[SimpleNamespace], None], pattern: str
) -> None:
    spoil(server)
    with refused(pattern):
        data.load(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    # Bound, so that nobody else takes the port, but not listening.
    with (
        socket.socket() as reserved,
        refused("CIFAR-10 cannot be downloaded into .*refused.*; check the network"),
    ):
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/cifar.tar.gz")
        data.load(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_archive_with_an_altered_file_leaves_nothing(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", "0" * 32]])
    with refused("the downloaded CIFAR-10 archive is corrupt"):
        data.load(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("stage", ["download", "extraction"])
@pytest.mark.parametrize("cause", [KeyboardInterrupt, OSError("No space left on device")])
def test_interrupted_download_leaves_nothing(
    server: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    cause: BaseException | type[BaseException],
) -> None:
    cache = tmp_path / "cache"
    published = []

    def write_a_part_of(path: str) -> None:
        Path(path).write_bytes(b"part")
        # What a kill, which cleans nothing up, would leave under the name that the next run trusts.
        published.append((cache / "cifar-10-batches-py").exists())
        raise cause

    def interrupt_download(url: str, filename: str) -> None:
        write_a_part_of(filename)

    def interrupt_extraction(archive: str, target: str, compression: str) -> None:
        os.mkdir(os.path.join(target, "cifar-10-batches-py"))
        write_a_part_of(os.path.join(target, "cifar-10-batches-py", "data_batch_1"))

    if stage == "download":
        monkeypatch.setattr(datasets.utils, "_urlretrieve", interrupt_download)
    else:
        monkeypatch.setitem(datasets.utils._ARCHIVE_EXTRACTORS, ".tar", interrupt_extraction)
    with pytest.raises(KeyboardInterrupt) if cause is KeyboardInterrupt else refused("No space left on device"):
        data.load(cache=cache)
    assert published == [False]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("first", ["a folder", "a file"])
def test_another_process_publishes_first(
    server: SimpleNamespace, python_version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    folder = tmp_path / "cache" / "cifar-10-batches-py"
    extract = datasets.utils._extract_tar

    def extract_and_lose_the_race(archive: str, target: str, compression: str) -> None:
        extract(archive, target, compression)
        if first == "a folder":
            shutil.copytree(python_version, folder)
        else:
            folder.write_bytes(b"in the way")

    monkeypatch.setitem(datasets.utils._ARCHIVE_EXTRACTORS, ".tar", extract_and_lose_the_race)
    if first == "a folder":
        assert_holds(data.load(cache=tmp_path / "cache"), random_batches())
    else:
        with refused("CIFAR-10 cannot be downloaded into .*Not a directory"):
            data.load(cache=tmp_path / "cache")
    assert list(folder.parent.iterdir()) == [folder]


def test_cache_that_is_a_file(server: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with refused("CIFAR-10 cannot be downloaded into .*cache: .*File exists"):
        data.load(cache=tmp_path / "cache")


def test_unreadable_cache(python_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "data_batch_1")

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", deny)
    with refused("original cannot be read: .*Permission denied.*; check its files and their permissions"):
        data.load(cache=python_version.parent)


@pytest.mark.parametrize(("module", "read"), [("torchvision.datasets", data.load), ("PIL.Image", data.read_image)])
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


def test_home_of_nobody() -> None:
    with refused("^~nobody-of-this-name/data is not a directory"):
        data.load(Path("~nobody-of-this-name/data"))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three and two training images, one and one test image of ape and bee, 5 pixels wide and 4 high."""
    numbers = np.random.default_rng(1)
    for name in (
        "train/bee/b.png",
        "train/bee/A.PNG",
        "train/ape/2.png",
        "train/ape/10.png",
        "train/ape/1.png",
    ):
        save(tmp_path / name, numbers.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    for name in ("test/ape/x.png", "test/bee/y.png"):
        save(tmp_path / name, numbers.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return tmp_path


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


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


def test_image_folder_of_jpegs(tmp_path: Path) -> None:
    for split, suffix in (("train", "jpg"), ("test", "jpeg")):
        folder = tmp_path / split / "only"
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 8), (10, 130, 250)).save(folder / f"a.{suffix}", quality=100)
    images = data.load(tmp_path).test.images
    assert images.shape == (1, 3, 8, 16)
    colour = torch.tensor([10, 130, 250])[:, None, None]
    assert (images[0].int() - colour).abs().max() <= 2


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


def resize_image(root: Path) -> None:
    save(root / "test/bee/y.png", np.zeros((5, 4, 3), dtype=np.uint8))


def spoil_image(root: Path) -> None:
    (root / "train/ape/2.png").write_bytes(b"not an image")


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (remove_test, r"test is missing; expected images in train/<class>/ and test/<class>/"),
        (remove_train, r"train is missing; expected images in train/<class>/ and test/<class>/"),
        (remove_classes, r"test holds no class folders; expected images in .*test/<class>/"),
        (rename_class, r"train and .*test hold different classes: bee, cat in only one of them"),
        (empty_class, r"test/bee holds no image; expected \.png, \.jpg, \.jpeg files"),
        (resize_image, r"bee/y\.png is 4 x 5 pixels; expected 5 x 4 as in .*train/ape/1\.png; resize"),
        (spoil_image, r"ape/2\.png is not an image; expected a format"),
    ],
)
def test_useless_image_folder(image_folder: Path, spoil: Callable[[Path], None], pattern: str) -> None:
    spoil(image_folder)
    with refused(pattern):
        data.load(image_folder)


def png(width: int, depth: int, colour_type: int, row: bytes, plte: bytes = b"", trns: bytes = b"") -> bytes:
    """A PNG file of one row, written by hand, so that no encoder stands between the bytes and the test."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0))
        + (chunk(b"PLTE", plte) if plte else b"")
        + (chunk(b"tRNS", trns) if trns else b"")
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def tiff(mode: str, width: int, row: bytes) -> bytes:
    file = io.BytesIO()
    Image.frombytes(mode, (width, 1), row).save(file, "TIFF")
    return file.getvalue()


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
TWO_COLOURS = bytes([10, 20, 30, 255, 0, 0])
# 128 and 129 lie on either side of half an 8-bit level, which is 257 16-bit levels.
LEVELS_16 = [0, 128, 129, 257, 256 * 128, 65535]
LEVELS_8 = [0, 0, 1, 1, 128, 255]


def grey(*levels: int) -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in levels]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(png(2, 8, RGB, bytes([1, 2, 3, 4, 5, 255])), [(1, 2, 3), (4, 5, 255)], id="RGB"),
        pytest.param(
            png(2, 8, RGB, bytes([1, 2, 3, 4, 5, 6]), trns=bytes([0, 4, 0, 5, 0, 6])),
            [(1, 2, 3), (255, 255, 255)],
            id="RGB with a transparent colour",
        ),
        # High bytes and low bytes agree, so that cutting off and rounding do.
        pytest.param(png(1, 16, RGB, bytes([9, 9, 128, 128, 255, 255])), [(9, 128, 255)], id="RGB of 16 bits"),
        pytest.param(
            png(3, 8, RGB_ALPHA, bytes([255, 0, 7, 255, 10, 20, 30, 0, 255, 0, 100, 51])),
            # With an alpha of a fifth, 0 becomes 0.8 * 255 and 100 becomes 0.2 * 100 + 0.8 * 255.
            [(255, 0, 7), (255, 255, 255), (255, 204, 224)],
            id="RGBA",
        ),
        pytest.param(png(2, 8, GREY, bytes([0, 77])), grey(0, 77), id="grey"),
        pytest.param(png(2, 8, GREY, bytes([0, 77]), trns=bytes([0, 77])), grey(0, 255), id="grey, transparent"),
        pytest.param(
            png(3, 8, GREY_ALPHA, bytes([100, 255, 100, 0, 0, 51])), grey(100, 255, 204), id="grey and alpha"
        ),
        pytest.param(png(4, 1, GREY, bytes([0b01100000])), grey(0, 255, 255, 0), id="1 bit"),
        pytest.param(png(4, 2, GREY, bytes([0b00011011])), grey(0, 85, 170, 255), id="2 bits"),
        pytest.param(png(2, 8, PALETTE, b"\1\0", TWO_COLOURS), [(255, 0, 0), (10, 20, 30)], id="palette"),
        pytest.param(
            png(2, 8, PALETTE, b"\0\1", TWO_COLOURS, trns=bytes([0, 51])),
            [(255, 255, 255), (255, 204, 204)],
            id="palette with alpha",
        ),
        pytest.param(png(6, 16, GREY, struct.pack(">6H", *LEVELS_16)), grey(*LEVELS_8), id="16-bit grey, PNG"),
        # The transparent level is 256; 255 and 257 are the same in 8 bits, but are not transparent.
        pytest.param(
            png(4, 16, GREY, struct.pack(">4H", 255, 256, 257, 0), trns=struct.pack(">H", 256)),
            grey(1, 255, 1, 0),
            id="16-bit grey with a transparent level",
        ),
        pytest.param(tiff("I;16", 6, struct.pack("<6H", *LEVELS_16)), grey(*LEVELS_8), id="16-bit grey, TIFF"),
        pytest.param(
            tiff("I;16B", 6, struct.pack(">6H", *LEVELS_16)), grey(*LEVELS_8), id="16-bit grey, big-endian"
        ),
        pytest.param(tiff("I", 6, struct.pack("=6i", *LEVELS_16)), grey(*LEVELS_8), id="16-bit grey in 32"),
        # Red is what cyan leaves: (255 - C) * (255 - K) / 255, and so on.
        pytest.param(
            tiff("CMYK", 3, bytes([0, 255, 255, 0, 255, 0, 0, 0, 0, 0, 0, 51])),
            [(255, 0, 0), (0, 255, 255), (204, 204, 204)],
            id="CMYK",
        ),
    ],
)
def test_read_image_of_each_mode(tmp_path: Path, content: bytes, expected: list[tuple[int, int, int]]) -> None:
    (tmp_path / "image").write_bytes(content)
    image = data.read_image(tmp_path / "image")
    assert image.mode == "RGB"
    assert image.size == (len(expected), 1)
    assert [image.getpixel((x, 0)) for x in range(image.width)] == expected


# What EXIF's definition of each orientation asks for, in terms of the stored rows and columns.
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, ["abc", "def"]),
        (2, ["cba", "fed"]),
        (3, ["fed", "cba"]),
        (4, ["def", "abc"]),
        (5, ["ad", "be", "cf"]),
        (6, ["da", "eb", "fc"]),
        (7, ["fc", "eb", "da"]),
        (8, ["cf", "be", "ad"]),
    ],
)
@pytest.mark.parametrize(
    ("format", "mode"), [("PNG", "L"), ("PNG", "I;16"), ("TIFF", "L"), ("TIFF", "I;16"), ("JPEG", "L")]
)
def test_read_image_upright(tmp_path: Path, orientation: int, upright: list[str], format: str, mode: str) -> None:
    # Blocks of 8 x 8 equal pixels, which JPEG keeps.
    block, scale = np.ones((8, 8), dtype=np.uint16), 1 if mode == "L" else 257
    stored = np.kron(np.array([[0, 40, 80], [120, 160, 200]], dtype=np.uint16), block) * scale
    image = Image.fromarray(stored.astype(np.uint8) if mode == "L" else stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "image", format, exif=exif)

    levels = np.kron(np.array([[40 * "abcdef".index(letter) for letter in row] for row in upright]), block)
    pixels = np.asarray(data.read_image(tmp_path / "image")).astype(int)
    assert pixels.shape == (*levels.shape, 3)
    tolerance = 2 if format == "JPEG" else 0
    assert np.abs(pixels - levels[..., None]).max() <= tolerance


def noise(format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        pytest.param(noise("PNG")[:20], "Truncated File Read", id="PNG cut in its header"),
        pytest.param(noise("PNG")[:2000], "truncated", id="truncated PNG"),
        pytest.param(noise("JPEG")[:1000], "truncated", id="truncated JPEG"),
        pytest.param(tiff("F", 1, struct.pack("=f", 0.5)), r"mode F with levels 0\.5 to 0\.5", id="floats"),
        pytest.param(tiff("I", 2, struct.pack("=2i", 0, 65536)), "mode I with levels 0 to 65536", id="17 bits"),
        pytest.param(tiff("I", 2, struct.pack("=2i", -1, 9)), "mode I with levels -1 to 9", id="negative"),
    ],
)
def test_read_image_refuses(tmp_path: Path, content: bytes, pattern: str) -> None:
    (tmp_path / "image.png").write_bytes(content)
    with refused(rf"image\.png cannot be read as an image: .*{pattern}.*; expected a complete image file"):
        data.read_image(tmp_path / "image.png")


@pytest.mark.parametrize("content", [b"", b"text\n" * 100], ids=["empty", "text"])
def test_read_image_needs_an_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.png").write_bytes(content)
    with refused(f"^{tmp_path}/image.png is not an image; expected a format that Pillow reads$"):
        data.read_image(tmp_path / "image.png")


@pytest.mark.parametrize(("name", "reason"), [("gone.png", "No such file or directory"), ("", "Is a directory")])
def test_read_image_needs_a_file(tmp_path: Path, name: str, reason: str) -> None:
    with refused(f"^{tmp_path / name} cannot be read as an image: {reason}; expected a complete image file$"):
        data.read_image(tmp_path / name)
