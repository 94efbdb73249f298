"""Compilers that are missing, named by CXX, fail or hang."""

import shutil
import time
from pathlib import Path

import pytest

from fastconv.kernels.cpu import compiler, processes
from fastconv.kernels.cpu.library import Unavailable, open_library

pytestmark = pytest.mark.usefixtures("cached")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Make CXX a shell script."""

    def make(script):
        path = tmp_path / "a compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setenv("CXX", f"'{path}'")
        return path

    return make


def refused(match):
    return pytest.raises(Unavailable, match=match)


def test_without_a_compiler_it_says_what_to_install(monkeypatch, sources):
    monkeypatch.setenv("PATH", "")
    with refused(r"^there is no C\+\+ compiler: install g\+\+ or clang, e\.g\. apt install g\+\+$"):
        open_library(sources)


@pytest.mark.parametrize("names", [("g++", "clang++", "c++"), ("clang++", "c++"), ("c++",)])
def test_the_first_that_is_installed_compiles(monkeypatch, tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("#!/bin/sh\necho version 1.2.3\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = compiler.find()
    assert found.command[0] == str(tmp_path / names[0])
    assert found.name == f"{names[0]} 1.2.3"


@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_cxx_may_have_arguments(monkeypatch, sources, name):
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    monkeypatch.setenv("CXX", f"{name} '-Dtwice=renamed'")
    assert open_library(sources).functions.renamed(21) == 42


@pytest.mark.parametrize("given", ["nowhere/g++ -O1", "'g++", " "])
def test_a_cxx_that_is_no_program(monkeypatch, given):
    monkeypatch.setenv("CXX", given)
    with pytest.raises(Unavailable) as raised:
        compiler.find()
    assert str(raised.value) == f"CXX is {given!r}, which is no program; name a C++ compiler in it, or unset it"


def test_a_compiler_that_fails_is_quoted(program, sources):
    program(
        'case "$*" in *" -c "*) echo "In file included from a.h" >&2; echo "a.h:1: error: no" >&2; exit 1;; esac'
    )
    with refused(
        r"a compiler cannot compile its kernels \(a\.h:1: error: no\); install a newer g\+\+ or clang, or"
    ):
        open_library(sources)
    program('case "$*" in *"-o "*.so) echo "ld: No space" >&2; echo "a: error: ld returned 1" >&2; exit 1;; esac')
    with refused(r"a compiler cannot link its kernels \(ld: No space\); install"):
        open_library(sources)
    program("exit 4")
    with refused(r"a compiler is no C\+\+ compiler \(exit code 4\)"):
        open_library(sources)
    program('case "$*" in *-dM*) echo "bad value (native)"; exit 1;; esac')
    with refused(r"a compiler cannot compile for this CPU \(exit code 1\)"):
        open_library(sources)


def test_a_file_that_is_not_executable_code(program, sources):
    program("").write_bytes(b"\x7fELF")
    with refused(r"a compiler cannot be started: Exec format error; check CXX and PATH"):
        open_library(sources)


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(program, sources, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "TIMEOUT_SECONDS", 0.3)
    program(f'case "$*" in *" -c "*) sleep 100 & echo $! > {tmp_path}/started; wait;; esac')
    start = time.monotonic()
    with refused(r"a compiler did not end within 0 s; name another compiler in CXX"):
        open_library(sources)
    assert time.monotonic() - start < 30
    child = int((tmp_path / "started").read_text())
    # Dead, or about to be waited for by its new parent.
    status = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_flags_where_march_native_is_not_known(program):
    program('case "$*" in *-march=native*) exit 1;; esac')
    assert compiler.find().command[-1] == "-mcpu=native"
