"""Kernels compute in the threads of torch's own OpenMP runtime."""

import ctypes
import sys

import pytest
from processes import run_python

from fastconv.kernels.cpu import library, openmp

pytestmark = pytest.mark.usefixtures("cached")

PRELUDE = """
import ctypes, os, re, sys
from pathlib import Path
import torch
from fastconv.kernels.cpu import library

def runtimes():
    return set(re.findall(r"/\\S*omp[^/\\s]*\\.so\\S*", Path("/proc/self/maps").read_text()))

def threads():
    return set(map(int, os.listdir("/proc/self/task")))

def noted(count):
    ids = (ctypes.c_long * count)()
    kernels.note_threads(ids, count)
    return set(ids)

torch.set_num_threads(2)
torch.ones(1 << 20).add(1)
before = runtimes()
kernels = library.open_library(Path(sys.argv[1])).functions
"""

POOL = """
there = threads()
used = noted(2)
assert len(used) == 2 and used <= there == threads(), (used, there, threads())
assert runtimes() == before and len(before) == 1, (before, runtimes())
"""

FORK = """
import signal
assert len(noted(2)) == 2
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    signal.alarm(30)
    torch.set_num_threads(1)
    torch.ones(1 << 20).add(1)
    os._exit(0 if noted(1) == {os.getpid()} else 1)
"""

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@needs_proc
def test_no_second_runtime_and_no_other_threads(sources):
    done = run_python("-c", PRELUDE + POOL, sources, OMP_NUM_THREADS=None)
    assert done.returncode == 0, done.stderr


@needs_proc
def test_a_forked_child_with_one_thread_does_not_hang(sources):
    done = run_python("-c", PRELUDE + FORK, sources, OMP_NUM_THREADS=None)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_without_a_runtime_there_is_one_thread(sources, monkeypatch):
    monkeypatch.setattr(openmp, "SYMBOLS", ("GOMP_parallel", "omp_get_thread_num", "no_such_function"))
    found = library.open_library(sources)
    assert not found.parallel
    ids = (ctypes.c_long * 1)(7)
    found.functions.note_threads(ids, 1)
    assert [*ids] == [7]
