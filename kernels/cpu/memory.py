"""Large pieces of memory for the kernels, used again and again.

Each training step saves pieces of the same sizes, and frees them. The system's allocator returns such pieces
to the system, which then clears each page anew at its first use; and with pages of 4 KiB a processor looks up more
addresses than it keeps at hand. On the lecture's block both together take a fifth of the time.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections import defaultdict

import torch
from torch import Tensor, nn

# Smaller pieces are left to PyTorch's allocator.
LEAST_BYTES = 2**20
# Pieces are multiples of a huge page.
PAGE_BYTES = 2**21
# Free pieces are kept up to so many bytes, several times what a step of the lecture's training saves.
MOST_KEPT_BYTES = 2**28

# By size. Without a lock: pieces may return at any moment, also while this thread takes one.
_FREE: defaultdict[int, list[mmap.mmap]] = defaultdict(list)


def empty_like(x: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor with the dtype and the device of `x`, which may be fake."""
    return empty(*shape) if type(x) in (Tensor, nn.Parameter) and x.is_cpu else x.new_empty(shape)


def empty(*shape: int) -> Tensor:
    """An uninitialised float32 tensor on the CPU."""
    length = math.prod(shape)
    if 4 * length < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape)
    size = -(-4 * length // PAGE_BYTES) * PAGE_BYTES
    try:
        piece = _FREE[size].pop()
    except IndexError:
        piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        piece.madvise(mmap.MADV_HUGEPAGE)
    view = (ctypes.c_char * size).from_buffer(piece)
    # The tensor's storage keeps the view alive; when it ends, the piece is free.
    weakref.finalize(view, _return, piece, size).atexit = False
    return torch.frombuffer(view, dtype=torch.float32, count=length).view(shape)


def _return(piece: mmap.mmap, size: int) -> None:
    if sum(each * len(pieces) for each, pieces in list(_FREE.items())) + size <= MOST_KEPT_BYTES:
        _FREE[size].append(piece)
