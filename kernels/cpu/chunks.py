"""What every call of a CPU kernel needs: how images are divided into chunks, and arguments as C takes them."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import library, memory

# Images of a chunk fill a line of cache, and more vectors while there are so many chunks for the threads, and a
# chunk's widest maps fit the cache of a core.
LINE_IMAGES = 16
LEAST_CHUNKS = 8
MOST_BYTES = 2**19


class Chunks(NamedTuple):
    """Images in chunks of `vectors` vectors of `lanes` images, of which the last chunk may have fewer."""

    images: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        """Images in a chunk."""
        return self.vectors * self.lanes

    @property
    def count(self) -> int:
        return (self.images + self.width - 1) // self.width

    @property
    def slots(self) -> int:
        """Threads that have work."""
        return max(1, min(self.count, torch.get_num_threads()))


def divide(images: int, channels: int, pixels: int) -> Chunks:
    """Chunks of images whose widest maps have so many channels and pixels; the number of threads plays no part."""
    lanes = library.load().fastconv_lanes()
    vectors = 1
    while lanes * vectors < min(LINE_IMAGES, images):
        vectors *= 2
    while images >= 2 * LEAST_CHUNKS * lanes * vectors and 8 * channels * pixels * lanes * vectors <= MOST_BYTES:
        vectors *= 2
    return Chunks(images, vectors, lanes)


def batch_last(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) as they lie for the kernels, with images side by side; a view if they do already."""
    return x.permute(1, 2, 3, 0).contiguous()


def new_maps(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised maps (N, channels, height, width) for the images of `x`, which lie side by side."""
    images = x.shape[0]
    strides = 1, height * width * images, width * images, images
    return x.new_empty_strided((images, channels, height, width), strides)


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A structure of C: for each type the names of its fields, in order."""
    types = {"integers": ctypes.c_int, "numbers": ctypes.c_double, "pointers": ctypes.c_void_p}
    members = [(field, types[kind]) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def call(function: str, arguments: ctypes.Structure) -> None:
    """Call a kernel with a workspace of the size that it asks for."""
    kernel, workspace_bytes = _kernel(function)
    workspace = memory.empty(workspace_bytes(ctypes.byref(arguments)) // 4)
    arguments.workspace = workspace.data_ptr()
    kernel(ctypes.byref(arguments))


@functools.cache
def _kernel(function: str) -> tuple[Any, Any]:
    """A kernel, and what returns the bytes of its workspace."""
    functions = library.load()
    workspace_bytes = functions[f"{function}_workspace"]
    workspace_bytes.restype = ctypes.c_size_t
    return functions[function], workspace_bytes
