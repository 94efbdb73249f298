"""Launches of kernels, which compile once and are cheap from then on, and what they choose for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor

from .errors import KernelError

# num_stages: how many rounds of a loop Triton overlaps, loading the next operands while it multiplies the last
# ones; its default is 3. With more than 1 these kernels hold more operands than there are registers, and spill.
# enable_fp_fusion: a multiplication and an addition become one instruction, which rounds once; a stencil is little
# else. Up to Triton 3.9 that is the default, which the environment can change.
COMPILER_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


class Launch:
    """A launch of a kernel whose numbers are known: from call to call only its tensors change.

    Triton works out at each launch which compiled kernel to take, in several times the microseconds that such a
    kernel runs. Here that is done once for all tensors that are aligned alike.

    Args:
        kernel: a function of `triton.jit`, whose arguments are tensors, some of them None, then numbers, then
            constants.
        programs: how many run.
        numbers: the kernel's, in its order.
        constants: the kernel's, by name, and options of the compiler, such as `num_warps`.
    """

    def __init__(self, kernel: Any, programs: int, *numbers: float, **constants: Any) -> None:
        self.kernel, self.programs = kernel, programs
        self.numbers, self.constants = numbers, constants
        self._interpreted = not isinstance(kernel, triton.JITFunction)
        self._runs: dict[Any, Callable[[list[int]], None]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current device and its current stream; for tensors on "meta" only compile.

        Their dtypes must be the same at each call.

        Raises:
            KernelError: the kernel does not compile, or the device cannot load it.
        """
        if self._interpreted:
            if not on_meta(tensors):
                self.kernel[(self.programs,)](*tensors, *self.numbers, **self.constants)
            return
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        run = self._run_for(pointers, tensors)
        if not on_meta(tensors):
            run(pointers)

    def prepare(self, *tensors: Tensor | None) -> None:
        """Compile and load what a call with these tensors launches, so that a CUDA graph can capture the call.

        Raises:
            KernelError: as a call.
        """
        if not self._interpreted:
            self._run_for([0 if x is None else x.data_ptr() for x in tensors], tensors)

    def _run_for(self, pointers: list[int], tensors: Sequence[Tensor | None]) -> Callable[[list[int]], None]:
        """What launches the kernel that is compiled for tensors aligned like these."""
        bits = reduce(or_, pointers)
        # Triton's wide loads are of 16 bytes.
        alignment = None if bits % 16 == 0 else tuple(pointer % 16 == 0 for pointer in pointers)
        run = self._runs.get(alignment)
        if run is None:
            run = self._runs[alignment] = self._bind(self.compile(*tensors))
        return run

    def compile(self, *tensors: Tensor | None) -> Any:
        """Triton's CompiledKernel for the current device and tensors like these, loaded.

        Raises:
            KernelError: as a call.
        """
        try:
            compiled = self.kernel.warmup(
                *tensors, *self.numbers, grid=(self.programs,), **(COMPILER_OPTIONS | self.constants)
            )
            # To load it is to see whether the device has the resources. Triton's public `run` raises only the
            # first time, and then when it is launched.
            compiled._init_handles()
        except Exception as error:
            # Whatever it is, from the compiler's own crash to a missing C compiler.
            raise KernelError(self.kernel.fn.__name__, _describe(error)) from error
        return compiled

    def _bind(self, compiled: Any) -> Callable[[list[int]], None]:
        """A function that launches a compiled kernel, given the addresses of the tensors."""
        driver = triton.runtime.driver.active
        device, current_stream = driver.get_current_device(), driver.get_current_stream
        runtime, programs = triton.knobs.runtime, self.programs
        names = self.kernel.arg_names
        first = next(i for i, name in enumerate(names) if name in self.constants)
        rest = (*self.numbers, *(self.constants[name] for name in names[first:]))
        run, function, packed_metadata = compiled.run, compiled.function, compiled.packed_metadata

        def launch(pointers: list[int]) -> None:
            stream = current_stream(device)
            enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
            if enter.calls or leave.calls:
                # Triton's profiler adds some.
                metadata = compiled.launch_metadata((programs, 1, 1), stream, *pointers, *rest)
                run(programs, 1, 1, stream, function, packed_metadata, metadata, enter, leave, *pointers, *rest)
            else:
                run(programs, 1, 1, stream, function, packed_metadata, None, None, None, *pointers, *rest)

        return launch


def _describe(error: BaseException) -> str:
    """What went wrong first, in one line: Triton wraps it, with the source of the kernel."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def on_meta(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the tensors of a launch, all on one device, have no memory: nothing can be launched then.

    Their addresses do not show it: that of a view on "meta" is its offset.
    """
    first = tensors[0]
    return first is not None and first.is_meta


def block_size(length: int, largest: int) -> int:
    """A power of two, at most `largest`, and at least 16, the least that tensor cores take."""
    return min(max(16, next_power_of_2(length)), largest)


def ceil_div(number: int, divisor: int) -> int:
    return (number + divisor - 1) // divisor


def next_power_of_2(number: int) -> int:
    return 1 << (int(number) - 1).bit_length()


def precision(x: Tensor) -> str:
    """How matrices are multiplied: those of float32 as `torch.set_float32_matmul_precision` says."""
    if x.dtype != torch.float32 or is_before_ampere():
        return "ieee"
    # AMD's matrix cores multiply float32 as it is; for NVIDIA's it is split into three products of tf32.
    highest = "ieee" if torch.version.hip else "tf32x3"
    return {"highest": highest, "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]


def is_before_ampere() -> bool:
    """Whether the current GPU is NVIDIA's, and its tensor cores take no tf32 and no bfloat16: Triton uses none."""
    return torch.version.hip is None and capability() < (8, 0)


def capability() -> tuple[int, int]:
    """The compute capability of the current GPU; kernels that are interpreted are as on an H100."""
    return torch.cuda.get_device_capability() if torch.cuda.is_initialized() else (9, 0)
