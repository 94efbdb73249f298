"""What the launches of all kernels have in common."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

# One stage: Triton's pipelining reads ahead more than registers hold. And multiplications fused with additions,
# which is the default only up to Triton 3.9.
COMPILER_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}

# Compiled kernels and the constants that follow their arguments, by all that they were compiled for.
COMPILED: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch `programs` programs of a kernel on the device of its first argument, whichever device is current.

    Triton works out at each launch which compiled kernel to take, in several times the microseconds that a kernel
    of ours runs. Here that is a look-up, by more than matters (every number and not only whether it is divisible),
    because more is quicker to write down.

    Args:
        arguments: of the kernel, up to its constants; the first is a tensor.
        options: the kernel's constants, and Triton's `num_warps`.
    """
    key = (id(kernel), arguments[0].device, *map(_specialisation, arguments), *options.values())
    with torch.cuda.device_of(arguments[0]):
        if key in COMPILED:
            compiled, constants = COMPILED[key]
            compiled[(programs, 1, 1)](*arguments, *constants)
        # The interpreter compiles nothing.
        elif (compiled := kernel[(programs,)](*arguments, **options, **COMPILER_OPTIONS)) is not None:
            COMPILED[key] = compiled, [options[name] for name in kernel.arg_names[len(arguments) :]]


def _specialisation(argument: Any) -> Any:
    """What of an argument decides how Triton compiles: of tensors the dtype, and alignment for wide loads."""
    return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, Tensor) else argument


def check_differentiated_once() -> None:
    """In a backward: refuse `create_graph=True`, whose second derivatives the kernels do not have."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fastconv's operations can be differentiated once, but create_graph=True asks for more; "
            'use fastconv.backend("reference")'
        )


def block_size(length: int, largest: int) -> int:
    """A power of two, at most `largest`, and at least 16, the least that tensor cores take."""
    return min(max(16, next_power_of_2(length)), largest)


def ceil_div(number: int, divisor: int) -> int:
    return (number + divisor - 1) // divisor


def next_power_of_2(number: int) -> int:
    return 1 << (int(number) - 1).bit_length()


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if the channels of `x` lie side by side, though perhaps not its pixels: else contiguous."""
    side_by_side = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if side_by_side else torch.contiguous_format


def flat_pixels(x: Tensor) -> Tensor:
    """`x` itself if one stride leads from each pixel to the next, else a copy of which that is true."""
    height, width = x.shape[2:]
    if height == 1 or width == 1 or x.stride(2) == width * x.stride(3):
        return x
    return x.contiguous(memory_format=memory_format(x))


def new_maps(x: Tensor, channels: int) -> Tensor:
    """Uninitialised maps like `x` but for their channels, in its memory format."""
    size = x.shape[0], channels, *x.shape[2:]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def stride_unit(*strides: int) -> int:
    """What divides all strides, up to the 16 elements of which wide accesses are.

    Of an integer Triton knows only whether 16 divides it, and channels are often 8 times something.
    """
    return math.gcd(16, *strides)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of image, channel and pixel of `flat_pixels(x)`."""
    return x.stride(0), x.stride(1), x.stride(2) if x.shape[3] == 1 else x.stride(3)


def precision(x: Tensor) -> str:
    """How matrices are multiplied: those of float32 as `torch.set_float32_matmul_precision` says."""
    if x.dtype != torch.float32:
        return "ieee"
    if is_before_ampere(x):
        return "ieee"
    # AMD's matrix cores multiply float32 as it is; for NVIDIA's it is split into three products of tf32.
    highest = "ieee" if torch.version.hip else "tf32x3"
    return {"highest": highest, "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]


def is_before_ampere(x: Tensor) -> bool:
    """Whether `x` is on a GPU of NVIDIA whose tensor cores take no tf32 and no bfloat16, and Triton uses none."""
    return torch.version.hip is None and capability(x.device) < (8, 0)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; interpreted kernels, on a CPU, are as on an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype to sum in: float32, or float64 if `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
