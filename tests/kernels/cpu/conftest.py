"""A folder of sources as small as it can be, and a cache folder of a test's own."""

import pytest

import fastconv
from fastconv.kernels.cpu import library

SOURCE = """
#include "twice.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();
static Parallel parallel = nullptr;
static Number thread_number = nullptr, thread_count = nullptr;

EXPORT void fastconv_set_openmp(void* p, void* number, void* count) {
    parallel = (Parallel)p, thread_number = (Number)number, thread_count = (Number)count;
}
EXPORT int fastconv_check() { return 0; }
EXPORT int twice(int x) { return TWICE(x); }

// The id of each thread that takes part, as the system has it.
#include <sys/syscall.h>
#include <unistd.h>
static void note(void* ids) { ((long*)ids)[thread_number()] = syscall(SYS_gettid); }
EXPORT void note_threads(long* ids, unsigned threads) {
    if (parallel) parallel(note, ids, threads, 0);
}
"""


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "twice.h").write_text("#define TWICE(x) (2 * (x))\n")
    (folder / "twice.cpp").write_text(SOURCE)
    return folder


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The folder of the compiled libraries."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache/native"


@pytest.fixture
def native():
    """Force the backend, or skip where it cannot run."""
    try:
        library.load()
    except library.Unavailable as error:
        pytest.skip(str(error))
    with fastconv.backend("native"):
        yield
