"""Threads for the CPU kernels: those of the OpenMP runtime that torch has loaded.

A second runtime would have threads of its own, which would fight with torch's for the cores. So the kernels are
compiled without OpenMP, and call torch's runtime through pointers, by the interface of GCC's compiled code. LLVM's
and Intel's runtimes for Linux have it too.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

SYMBOLS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def connect(library: ctypes.CDLL) -> bool:
    """Give the kernels torch's threads; return whether they have them, and are not left with one thread."""
    addresses = _addresses()
    library.fastconv_set_openmp.argtypes = [ctypes.c_void_p] * len(SYMBOLS)
    library.fastconv_set_openmp.restype = None
    library.fastconv_set_openmp(*(addresses or [None] * len(SYMBOLS)))
    return addresses is not None


def _addresses() -> list[int | None] | None:
    """The addresses of SYMBOLS, looked up where the loader looks for torch; None if one is missing."""
    # First what all libraries see, then what libtorch_cpu depends on.
    for name in (None, "libtorch_cpu.so"):
        with suppress(OSError, AttributeError):
            loaded = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            return [ctypes.cast(loaded[symbol], ctypes.c_void_p).value for symbol in SYMBOLS]
    return None
