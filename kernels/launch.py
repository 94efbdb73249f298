"""What the launches of all kernels have in common."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch `programs` programs of a kernel on the device of its first argument, whichever device is current."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **options)


def check_differentiated_once() -> None:
    """In a backward: refuse `create_graph=True`, whose second derivatives the kernels do not have."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fastconv's operations can be differentiated once, but create_graph=True asks for more; "
            'use fastconv.backend("reference")'
        )


def block_size(length: int, largest: int) -> int:
    """A power of two, at most `largest`, and at least 16, the least that tensor cores take."""
    return min(max(16, triton.next_power_of_2(length)), largest)


def flat_pixels(x: Tensor) -> Tensor:
    """`x` itself if one stride leads from each pixel to the next, else a copy of which that is true."""
    height, width = x.shape[2:]
    if height == 1 or width == 1 or x.stride(2) == width * x.stride(3):
        return x
    return x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of image, channel and pixel of `flat_pixels(x)`."""
    return x.stride(0), x.stride(1), x.stride(2) if x.shape[3] == 1 else x.stride(3)


def precision(x: Tensor) -> str:
    """How float32 matrices are multiplied: as `torch.set_float32_matmul_precision` says."""
    highest = "ieee" if x.device.type == "cpu" or torch.version.hip else "tf32x3"
    return {"highest": highest, "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype to sum in: float32, or float64 if `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
