"""What every call of a CPU kernel needs: how images are divided into chunks, and arguments as C takes them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import library
from .exchange import Exchange

# Images of a chunk fill a line of cache, and more vectors while there are so many chunks for the threads, and a
# chunk's widest maps fit the cache of a core.
LINE_IMAGES = 16
LEAST_CHUNKS = 8
MOST_BYTES = 2**19
MOST_VECTORS = 8  # As in sources/chunks.h.
ALIGNMENT = 64  # Bytes, of vectors as of the memory that PyTorch allocates.
# Elements that are worth a thread where each is only moved, or little more.
SLOT_ELEMENTS = 2**14


@dataclass(frozen=True)
class Chunks:
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


def divide(x: Tensor, depthwise_weight: Tensor) -> Chunks:
    """Chunks of the images of maps x (N, C, H, W) for their convolution; the number of threads plays no part."""
    images, _, height, width = x.shape
    channels, pixels = depthwise_weight.shape[0], height * width
    lanes = library.load().fastconv_lanes()
    vectors = 1
    while lanes * vectors < min(LINE_IMAGES, images):
        vectors *= 2
    while (
        vectors < MOST_VECTORS
        and images >= 2 * LEAST_CHUNKS * lanes * vectors
        and 8 * channels * pixels * lanes * vectors <= MOST_BYTES
    ):
        vectors *= 2
    return Chunks(images, vectors, lanes)


def batch_last(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) as they lie for the kernels, [C, H, W, N], with images side by side; a view if they do."""
    y = x.permute(1, 2, 3, 0)
    if y.is_contiguous() or not x.is_contiguous():
        return y.contiguous()
    y = y.new_empty(y.shape)
    transpose(x, y, x.shape[0])
    return y


def new_batch_last(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised maps (N, channels, height, width) for the images of `x`, which lie side by side."""
    images = x.shape[0]
    strides = 1, height * width * images, width * images, images
    return x.new_empty_strided((images, channels, height, width), strides)


def new_maps(x: Tensor, channels: int) -> Tensor:
    """Uninitialised maps (N, channels, H, W) for the images of `x`: contiguous if it is, else side by side."""
    images, _, height, width = x.shape
    if x.is_contiguous():
        return x.new_empty(images, channels, height, width)
    return new_batch_last(x, channels, height, width)


@contextmanager
def written_batch_last(y: Tensor) -> Iterator[Tensor]:
    """[C, H, W, N], with images side by side, for a kernel to write the maps y of `new_maps` to."""
    maps = y.permute(1, 2, 3, 0)
    if maps.is_contiguous():
        yield maps
        return
    maps = y.new_empty(maps.shape)
    yield maps
    transpose(maps, y, maps.shape[:3].numel())


def transpose(x: Tensor, y: Tensor, rows: int) -> None:
    """Write the transpose of a contiguous x, as a matrix of so many rows, to a contiguous y."""
    if x.is_meta:
        return
    slots = max(1, min(x.numel() // SLOT_ELEMENTS, torch.get_num_threads()))
    columns = x.numel() // rows
    arguments = _Transposition(rows=rows, columns=columns, slots=slots, x=address(x), y=address(y))
    library.load().fastconv_transpose(ctypes.byref(arguments))


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A structure of C: for each type the names of its fields, in order."""
    types = {"integers": ctypes.c_int, "numbers": ctypes.c_double, "pointers": ctypes.c_void_p}
    members = [(field, types[kind]) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


def depthwise_arguments(x: Tensor, weight: Tensor, norm: str, chunks: Chunks) -> dict[str, int | None]:
    """The fields for a depthwise convolution and its norm, from maps x [C, H, W, N]."""
    channels, height, width, images = x.shape
    return {
        "images": images,
        "channels": channels,
        "outputs": weight.shape[0],
        "height": height,
        "width": width,
        "kernel_height": weight.shape[2],
        "kernel_width": weight.shape[3],
        "vectors": chunks.vectors,
        "slots": chunks.slots,
        "over_sample": ("tensor", "sample").index(norm),
        "x": address(x),
        "taps": address(weight),
    }


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def aligned(x: Tensor) -> Tensor:
    """What a kernel saved, for vectors to be read from; a copy if a hook for saved tensors has moved it."""
    if x.data_ptr() % ALIGNMENT == 0 and x.is_contiguous():
        return x
    return x.clone(memory_format=torch.contiguous_format)


_Transposition = structure("Transposition", integers="rows columns slots", pointers="x y")


def call(function: str, arguments: ctypes.Structure, exchange: Exchange | None = None) -> None:
    """Call a kernel with a workspace of the size that it asks for, and its exchange with other ranks, if any."""
    run, workspace_size = _functions(function)
    workspace = torch.empty(workspace_size(ctypes.byref(arguments)), dtype=torch.uint8, device="cpu")
    arguments.workspace = workspace.data_ptr()
    if exchange is None:
        run(ctypes.byref(arguments))
    else:
        exchange.run(run, arguments)


@functools.cache
def _functions(name: str) -> tuple[Any, Any]:
    """The kernel, and the function that gives the bytes of its workspace."""
    functions = library.load()
    workspace_size = functions[f"{name}_workspace"]
    workspace_size.restype = ctypes.c_size_t
    return functions[name], workspace_size
