"""Files that are complete at any moment: what a full disk, a kill or a link does to them."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from fastconv import files
from fastconv.files import WriteError, remove_partial, write_atomically


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """A file on a full disk."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    write = full


def torch_save(file):
    torch.save({"weight": torch.zeros(1000)}, file)


@pytest.mark.parametrize("write", [lambda file: file.write(b"new"), torch_save], ids=["bytes", "torch.save"])
@pytest.mark.parametrize("failing", ["open", "write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write, failing):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(files, "open", FullFile, raising=False)
        elif failing == "open":
            patch.setattr(files, "open", full, raising=False)
        else:
            patch.setattr(os, failing, full)
        with pytest.raises(
            WriteError, match=r"a\.pt cannot be written: No space left on device; make room"
        ) as caught:
            write_atomically(path, write)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.pt"]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_other_errors_pass_and_leave_nothing(tmp_path):
    def fail(file):
        file.write(b"part")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", fail)
    with pytest.raises(RuntimeError, match="of its own"):
        write_atomically(tmp_path / "a", lambda _: (_ for _ in ()).throw(RuntimeError("of its own")))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_has_gone(tmp_path):
    with pytest.raises(WriteError, match="gone/a cannot be written: No such file or directory"):
        write_atomically(tmp_path / "gone/a", lambda file: file.write(b"new"))


def test_no_link_is_followed(tmp_path, monkeypatch):
    """Neither one at the file's place nor one at the temporary's, whose name somebody guessed."""
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "a").symlink_to("theirs")
    write_atomically(tmp_path / "a", lambda file: file.write(b"ours"))
    assert not (tmp_path / "a").is_symlink()
    monkeypatch.setattr(files.os, "urandom", bytes)
    (tmp_path / ".a.00000000.partial").symlink_to("theirs")
    with pytest.raises(WriteError, match="File exists"):
        write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / ".a.00000000.partial").is_symlink()
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert (tmp_path / "a").read_bytes() == b"ours"


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    def write(file):
        file.write(b"outer")
        write_atomically(tmp_path / "a", lambda inner: inner.write(b"inner"))
        assert (tmp_path / "a").read_bytes() == b"inner"

    write_atomically(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"outer"
    assert os.listdir(tmp_path) == ["a"]


def test_only_our_partial_files_are_removed(tmp_path):
    for name in (".a.0123abcd.partial", ".b.0123abcd.partial", "a.partial", "a"):
        (tmp_path / name).touch()
    remove_partial(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [".b.0123abcd.partial", "a", "a.partial"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_disk_that_fills_while_lines_are_written_is_named():
    refused = pytest.raises(WriteError, match="/dev/full cannot be written: No space left on device; make room")
    with refused, files.writing(Path("/dev/full")) as file:
        print("a line", file=file)


def test_a_file_that_cannot_be_opened_for_lines_is_named(tmp_path):
    with pytest.raises(WriteError, match=r"nowhere/lines cannot be written: No such file"):
        files.writing(tmp_path / "nowhere/lines").__enter__()


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {}, "home/.cache/fastconv"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/fastconv"),
        ("linux", {"XDG_CACHE_HOME": "xdg", "FASTCONV_CACHE": "ours"}, "ours"),
        ("linux", {"FASTCONV_CACHE": "~/ours"}, "home/ours"),
        ("darwin", {}, "home/Library/Caches/fastconv"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/fastconv"),
    ],
)
def test_the_cache_folder_is_that_of_the_platform(monkeypatch, platform, variables, folder):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", "home")
    for name in ("XDG_CACHE_HOME", "FASTCONV_CACHE", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert files.cache_folder() == Path(folder)


def test_without_a_home_there_is_no_cache_folder(monkeypatch):
    for name in ("XDG_CACHE_HOME", "FASTCONV_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    pwd = pytest.importorskip("pwd")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(FileNotFoundError, match="there is no home folder to keep files in; set FASTCONV_CACHE"):
        files.cache_folder()
