"""Finds the machine's C++ compiler, and compiles the kernels' sources for the machine's own CPU."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .processes import Unavailable, lines_of_failure, run

# No -fopenmp, which would load a second runtime beside torch's: see `openmp.py`.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=hidden")
# Some compilers for ARM take only the second.
NATIVE_FLAGS = ("-march=native", "-mcpu=native")
# In what a compiler prints, where the first lines may only say which file was included from where. What the linker
# says comes before the line that it failed.
ERROR = re.compile("error: (?!ld returned|linker command)")
PROGRAMS = ("g++", "clang++", "c++")


class Compiler(NamedTuple):
    """A compiler that compiles for this CPU.

    Args:
        command: its absolute path, then arguments that CXX gave, then all flags.
        version: all that it says about its version.
        macros: what it predefines for this CPU, among them which instructions there are.
    """

    command: tuple[str, ...]
    version: str
    macros: str

    @property
    def name(self) -> str:
        """For people, such as "g++ 12.2.0"."""
        number = re.search(r"\d+(\.\d+)+", self.version)
        return " ".join([Path(self.command[0]).name, *([number[0]] if number else [])])


def find() -> Compiler:
    """Return the compiler that CXX names, else the first of PROGRAMS that is installed.

    Raises:
        Unavailable: there is none, or it does not work.
    """
    if os.name != "posix":
        raise Unavailable("its kernels are compiled on Linux and macOS only")
    program = _program()
    version = _succeed([*program, "--version"], "is no C++ compiler").stdout
    for native in NATIVE_FLAGS:
        command = *program, *FLAGS, native
        defined = run([*command, "-dM", "-E", "-x", "c++", "-"])
        if defined.returncode == 0:
            return Compiler(command, version, defined.stdout)
    raise Unavailable(_failure(defined, "cannot compile for this CPU"))


def compile_sources(compiler: Compiler, sources: Sequence[Path], library: Path) -> None:
    """Compile `.cpp` files at the same time, and link them into one shared library.

    Raises:
        Unavailable: the compiler fails or hangs.
    """
    objects = [str(library.with_name(f"{source.stem}.o")) for source in sources]

    def compile_one(source: Path, into: str) -> None:
        _succeed([*compiler.command, "-c", str(source), "-o", into], "cannot compile its kernels")

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, sources, objects))
    _succeed([*compiler.command, *objects, "-o", str(library)], "cannot link its kernels")


def _program() -> list[str]:
    """The compiler's absolute path, and the arguments that CXX gives it."""
    if given := os.environ.get("CXX"):
        try:
            program, *arguments = shlex.split(given)
        except ValueError:
            program, arguments = given, []
        if (path := shutil.which(program)) is None:
            raise Unavailable(f"CXX is {given!r}, which is no program; name a C++ compiler in it, or unset it")
        return [path, *arguments]
    for name in PROGRAMS:
        if path := shutil.which(name):
            return [path]
    raise Unavailable("there is no C++ compiler: install g++ or clang, e.g. apt install g++")


def _succeed(command: Sequence[str], problem: str) -> subprocess.CompletedProcess[str]:
    done = run(command)
    if done.returncode != 0:
        raise Unavailable(_failure(done, problem))
    return done


def _failure(done: subprocess.CompletedProcess[str], problem: str) -> str:
    lines = lines_of_failure(done)
    line = next(filter(ERROR.search, lines), lines[0])
    return f"{done.args[0]} {problem} ({line.strip()}); install a newer g++ or clang, or name it in CXX"
