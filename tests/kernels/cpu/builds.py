"""The kernels compiled in other ways than a user's, and the cases by which they are tried."""

import ctypes
from contextlib import contextmanager
from unittest import mock

from fastconv.checking.inputs import Sizes
from fastconv.kernels.common.registration import forget_plans
from fastconv.kernels.cpu import chunks, compiler, layer_norm, library, openmp, patches

# images, channels, height, width, multiplier, kernel: no number of images fills the vectors, nor any rows a tile.
SIZES = [
    Sizes(37, 3, 8, 8, 3, (7, 7)),
    Sizes(300, 2, 3, 2, 4, (7, 7)),
    Sizes(5, 11, 3, 5, 1, (3, 7)),
    Sizes(9, 2, 5, 19, 9, (5, 3)),
    Sizes(3, 3, 2, 3, 2, (9, 5)),
    Sizes(1, 1, 1, 1, 3, (1, 1)),
]
# images, inputs, height, width, outputs, patch
PATCHES = [(37, 3, 11, 13, 9, (4, 2)), (3, 5, 2, 2, 1, (2, 2)), (1, 2, 3, 5, 10, (3, 3))]


def compile_kernels(path, *flags):
    """Compile the library, by the compiler that CXX names, if it takes the flags; return the compiler."""
    found = compiler.find()
    found = found._replace(command=(*found.command, *flags))
    compiler.compile_sources(found, sorted(library.SOURCES.glob("*.cpp")), path)
    return found


@contextmanager
def used(path):
    """Operations run on the library of this file, and divide even little work among threads."""
    functions = ctypes.CDLL(str(path))
    planted = library.Library(functions, "", "", path, openmp.connect(functions))
    # Plans know the lanes of the library for which they were made.
    chunks._functions.cache_clear()
    forget_plans()
    try:
        with (
            mock.patch.object(library, "_first_use", return_value=planted),
            mock.patch.object(chunks, "SLOT_ELEMENTS", 16),
            mock.patch.object(layer_norm, "SLOT_ELEMENTS", 16),
            mock.patch.object(patches, "LEAST_WORK", 1),
        ):
            yield
    finally:
        chunks._functions.cache_clear()
        forget_plans()
