"""The library of CPU kernels: compiled once, found again, and never a file that is broken or somebody else's."""

import errno
import functools
import multiprocessing
import os
import sys
import tempfile
import threading

import pytest
import torch

import fastconv
from fastconv.kernels.cpu import cache, compiler, library
from fastconv.kernels.cpu.library import Unavailable, open_library
from fastconv.operations import backends, functional, portable, reference

pytestmark = pytest.mark.usefixtures("cached")


@pytest.fixture
def compiled(monkeypatch):
    """Counts the compilations."""
    calls, original = [], compiler.compile_sources
    monkeypatch.setattr(compiler, "compile_sources", lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder of temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def kept(sources, tmp_path):
    """A library in the cache, as another process leaves it. The loader of this one has not seen its path."""
    found, fresh = compiler.find(), tmp_path / "fresh.so"
    compiler.compile_sources(found, [sources / "twice.cpp"], fresh)
    return cache.keep(library._key(sources, found), fresh.read_bytes(), lambda _: None)


@pytest.fixture
def first_use(sources, monkeypatch):
    """A process in which the library was not asked for, and whose sources are these."""
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setattr(library, "_first_use", functools.cache(library._first_use.__wrapped__))


def test_it_is_compiled_once_and_says_so(sources, cached, compiled, scratch, capsys):
    first = open_library(sources)
    assert first.functions.twice(21) == 42
    assert first.path == cached / f"{first.key}.so"
    assert first.compiler in (line := capsys.readouterr().err)
    assert line.startswith("fastconv: compiled the CPU kernels in 0.")
    assert line.endswith(f"; kept in {cached})\n")
    assert open_library(sources)._replace(functions=None) == first._replace(functions=None)
    assert capsys.readouterr().err == ""
    assert len(compiled) == 1
    assert os.listdir(cached) == [first.path.name]
    assert os.listdir(scratch) == []


def test_what_decides_the_results_decides_the_key(sources, monkeypatch):
    keys = [open_library(sources).key]
    (sources / "twice.h").write_text("#define TWICE(x) (2 * (x) + 1)\n")
    changed = open_library(sources)
    assert changed.functions.twice(21) == 43
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-mno-avx2"))
    keys += [changed.key, open_library(sources).key]
    found = compiler.find()
    for other in (found._replace(macros="#define __SSE2__ 1"), found._replace(version="g++ 99.1")):
        keys.append(library._key(sources, other))
    assert len(set(keys)) == len(keys)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_another_library_in_its_place(path):
    path.unlink()
    another = b"a whole library"
    path.write_bytes(another + cache._seal("another key", another))
    path.chmod(0o600)


def make_it_a_link(path):
    (path.parent.parent / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b"#!/bin/sh\n"),
        lambda path: path.chmod(0o622),
        flip_a_bit,
        put_another_library_in_its_place,
        make_it_a_link,
    ],
    ids=["empty", "a byte short", "truncated", "text", "writable by others", "a bit", "another library", "a link"],
)
def test_a_damaged_or_foreign_file_is_replaced(sources, kept, compiled, damage):
    damage(kept)
    found = open_library(sources)
    assert (found.functions.twice(21), found.path) == (42, kept)
    assert len(compiled) == 1
    assert cache.find(found.key) == kept
    assert not kept.is_symlink()


def test_a_library_that_cannot_be_loaded_is_compiled_again(sources, kept, compiled):
    """Whole, and under its key, but of another machine with the same home."""
    cache.keep(kept.stem, b"\x7fELF for another system", lambda _: None)
    assert open_library(sources).functions.twice(21) == 42
    assert len(compiled) == 1


def test_a_whole_file_is_loaded(sources, kept, compiled):
    assert open_library(sources).functions.twice(21) == 42
    assert compiled == []


def another_users(monkeypatch, cached):
    cached.mkdir(parents=True, mode=0o700)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)


def writable_by_others(_, cached):
    cached.mkdir(parents=True)
    cached.chmod(0o777)


def a_link(_, cached):
    (cached.parent / "elsewhere").mkdir(parents=True, mode=0o700)
    cached.symlink_to("elsewhere")


@pytest.mark.parametrize("of", [another_users, writable_by_others, a_link])
def test_a_folder_that_others_can_write_is_not_used(monkeypatch, sources, cached, scratch, compiled, capsys, of):
    of(monkeypatch, cached)
    for _ in range(2):
        found = open_library(sources)
        assert (found.functions.twice(21), found.path) == (42, None)
        assert capsys.readouterr().err.endswith(
            f"; not kept: {cached} can be written by other users; remove it, or set FASTCONV_CACHE)\n"
        )
    assert len(compiled) == 2
    assert os.listdir(cached) == os.listdir(scratch) == []


def test_a_library_of_another_user_is_not_loaded(monkeypatch, kept):
    status = os.fstat
    monkeypatch.setattr(
        os, "fstat", lambda file: os.stat_result((*status(file)[:4], os.geteuid() + 1, *status(file)[5:]))
    )
    assert cache.find(kept.stem) is None


def in_a_file(monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    return "File exists"


def full(monkeypatch, tmp_path):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    return "cannot be written: No space left on device; make room on its disk, or check its folder"


def read_only(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CACHE", "/proc/fastconv")
    return "/proc/fastconv"


def without_a_home(monkeypatch, tmp_path):
    for name in ("FASTCONV_CACHE", "HOME"):
        monkeypatch.delenv(name)
    pwd = pytest.importorskip("pwd")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    return "there is no home folder to keep files in; set FASTCONV_CACHE"


@pytest.mark.parametrize("unusable", [in_a_file, full, read_only, without_a_home])
def test_without_a_cache_it_is_compiled_for_this_process(
    monkeypatch, tmp_path, sources, scratch, compiled, capsys, unusable
):
    reason = unusable(monkeypatch, tmp_path)
    for _ in range(2):
        found = open_library(sources)
        assert (found.functions.twice(21), found.path) == (42, None)
        line = capsys.readouterr().err
        assert "; not kept: " in line
        assert reason in line
        assert line.count("\n") == 1
    assert len(compiled) == 2
    assert os.listdir(scratch) == []


def test_without_a_temporary_folder_there_is_none(monkeypatch, sources, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match=r"cannot be loaded \(.*nowhere.*\); set TMPDIR or FASTCONV_CACHE"):
        open_library(sources)


def test_where_the_compiler_cannot_write_there_is_none(sources):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # In place of a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(Unavailable, match=r"cannot compile its kernels \(.*error.*\); install a newer"):
            open_library(sources)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        ("return 3;", "exit code 3"),
        ("__builtin_trap();", "ended by SIG"),
        ("undefined();", "undefined symbol"),
    ],
    ids=["a wrong result", "an unknown instruction", "a missing function"],
)
def test_a_library_that_fails_here_is_not_loaded(sources, cached, scratch, check, reason):
    path = sources / "twice.cpp"
    path.write_text("void undefined();\n" + path.read_text().replace("return 0;", check))
    with pytest.raises(Unavailable, match=rf"compiled for this CPU, fail on it \(.*{reason}.*\); name another"):
        open_library(sources)
    assert os.listdir(cached) == os.listdir(scratch) == []


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a new process takes seconds")
def test_two_processes_compile_at_once(sources, cached):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)

    def work():
        start.wait()
        sys.exit(open_library(sources).functions.twice(21))

    both = [context.Process(target=work) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [42, 42]
    (name,) = os.listdir(cached)
    assert cache.find(name.removesuffix(".so")) == cached / name


def test_threads_compile_once(first_use, compiled):
    start, found = threading.Barrier(4), []

    def work():
        start.wait()
        found.append(library.load())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [library.load()] * 4
    assert len(compiled) == 1


def test_a_graph_that_is_traced_first_compiles_it(first_use, compiled, monkeypatch):
    backends._native_refuses.cache_clear()
    monkeypatch.setitem(backends._MODULES, "native", portable)
    torch.compiler.reset()
    x = torch.rand(2, 3, 4, 5)
    with fastconv.backend("native"):
        graph = torch.compile(functional.layer_norm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(graph(x), reference.layer_norm(x))
    backends._native_refuses.cache_clear()
    assert len(compiled) == 1


def test_what_failed_once_is_not_tried_again(first_use, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(Unavailable, match="there is no C\\+\\+ compiler"):
            library.load()
    with pytest.raises(Unavailable, match="there is no C\\+\\+ compiler"):
        library.load()
