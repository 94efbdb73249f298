"""A download is complete or leaves nothing, whatever ends it."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from layouts import assert_holds_random_batches, refused, take_as_official, write_python_version
from torchvision import datasets

from fastconv.training import data, download


def visible(folder: Path) -> list[str]:
    """What is in a folder but for the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


@pytest.fixture
def python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "original" / "cifar-10-batches-py"
    take_as_official(write_python_version(folder), monkeypatch)
    return folder


@pytest.fixture
def server(python_version: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A web server of the small Python version's archive, which torchvision takes for the official one."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(python_version, arcname=python_version.name)
    body = archive.getvalue()
    state = SimpleNamespace(
        status=200, body=body, length=len(body), requests=0, stalls=False, go_on=threading.Event()
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            self.send_response(state.status)
            self.send_header("Content-Length", str(state.length))
            self.end_headers()
            self.wfile.write(state.body)
            if state.stalls:
                self.wfile.flush()
                state.go_on.wait()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{http.server_port}/cifar.tar.gz")
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(body).hexdigest())
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.go_on.set()
        http.shutdown()
        thread.join()


def test_download_once(server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "not" / "yet" / "there"
    dataset = data.load(cache=cache)
    assert_holds_random_batches(dataset)
    assert visible(cache) == ["cifar-10-batches-py"]
    progress = capsys.readouterr()
    assert f"downloading CIFAR-10 (170 MB) into {cache}" in progress.err
    assert f"{server.length / 1000:.1f}/{server.length / 1000:.1f} kB" in progress.err
    assert progress.out == ""

    requests = server.requests
    assert requests > 0
    assert_holds_random_batches(data.load(cache=cache))
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


def stall(server: SimpleNamespace) -> None:
    cut_short(server)
    server.stalls = True


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (not_found, r"CIFAR-10 cannot be downloaded into .*404.*; check the network and the disk"),
        (
            alter,
            r"the archive from http://.*/cifar\.tar\.gz has the wrong checksum; try again, or pass --data DIR",
        ),
        # Some versions of Python notice that the answer is cut short; for the others the checksum shows it.
        (cut_short, r"CIFAR-10 cannot be downloaded|the archive .* has the wrong checksum"),
        (stall, r"CIFAR-10 cannot be downloaded into .*timed out; check the network and the disk, or pass --data"),
    ],
)
def test_failed_download_leaves_nothing(
    server: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[SimpleNamespace], None],
    pattern: str,
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    spoil(server)
    with refused(pattern):
        data.load(cache=tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


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
    assert visible(tmp_path / "cache") == []


def interrupt() -> None:
    raise KeyboardInterrupt


def fill_the_disk() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stage", ["download", "extraction"])
@pytest.mark.parametrize("cause", [interrupt, fill_the_disk])
def test_interrupted_download_leaves_nothing(
    server: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    cause: Callable[[], None],
) -> None:
    cache = tmp_path / "cache"
    published = []

    def stop() -> None:
        # What a kill, which cleans nothing up, would leave under the name that the next run trusts.
        published.append((cache / "cifar-10-batches-py").exists())
        cause()

    def copy_a_part(source: io.BufferedIOBase, target: io.BufferedIOBase) -> None:
        target.write(source.read(100))
        stop()

    def extract_a_part(archive: str, target: str, compression: str) -> None:
        os.mkdir(os.path.join(target, "cifar-10-batches-py"))
        Path(target, "cifar-10-batches-py", "data_batch_1").write_bytes(b"part")
        stop()

    if stage == "download":
        monkeypatch.setattr(download.shutil, "copyfileobj", copy_a_part)
    else:
        monkeypatch.setitem(datasets.utils._ARCHIVE_EXTRACTORS, ".tar", extract_a_part)
    expected = {
        interrupt: pytest.raises(KeyboardInterrupt),
        fill_the_disk: refused("CIFAR-10 cannot be downloaded into .*No space left on device; check"),
    }
    with expected[cause]:
        data.load(cache=cache)
    assert published == [False]
    assert visible(cache) == []


def test_what_a_kill_left_is_removed(server: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "cache/.download/cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "cache/.download/cifar-10-batches-py/data_batch_1").write_bytes(b"part")
    assert_holds_random_batches(data.load(cache=tmp_path / "cache"))
    assert visible(tmp_path / "cache") == ["cifar-10-batches-py"]


def test_a_download_under_way_is_waited_for(
    server: SimpleNamespace, python_version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, loaded = tmp_path / "cache", []
    cache.mkdir()
    with FileLock(cache / ".download.lock"):
        thread = threading.Thread(target=lambda: loaded.append(data.load(cache=cache)))
        thread.start()
        printed = ""
        while "another process downloads CIFAR-10 into" not in printed:
            assert thread.is_alive()
            printed += capsys.readouterr().err
        shutil.copytree(python_version, cache / "cifar-10-batches-py")
    thread.join()
    assert_holds_random_batches(*loaded)
    assert server.requests == 0


def test_a_file_in_the_way_is_named_before_the_download(server: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").write_bytes(b"in the way")
    with refused("cifar-10-batches-py is a file; expected the folder of CIFAR-10; remove it"):
        data.load(cache=tmp_path)
    assert server.requests == 0


def test_cache_that_is_a_file(server: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with refused("CIFAR-10 cannot be downloaded into .*cache: .*File exists"):
        data.load(cache=tmp_path / "cache")
