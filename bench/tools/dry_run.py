"""Kernels compiled and launched without a GPU: a driver of Triton whose launches do nothing.

Triton asks its driver which GPU to compile for. This driver names one, so Triton specialises and compiles exactly
what a call with tensors on that GPU would compile, here from tensors on the CPU, whose contents do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastconv.kernels.common import launch, registration

# NVIDIA's GPUs, and the shared memory that a program can have, in KiB.
_NVIDIA = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Each GPU, by the name of NVIDIA's or AMD's compiler, and that memory in bytes.
TARGETS = {
    **{f"sm_{number}": (GPUTarget("cuda", number, 32), memory * 1024) for number, memory in _NVIDIA.items()},
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Launch(NamedTuple):
    kernel: str
    # Triton's CompiledKernel.
    compiled: Any
    programs: int
    # All of the kernel's arguments, by name.
    arguments: dict[str, Any]

    @property
    def bytes(self) -> int:
        """The size of all tensors that the kernel is given."""
        tensors = {id(argument): argument for argument in self.arguments.values() if isinstance(argument, Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class DryDriver:
    """A driver with only what Triton's JIT asks for."""

    def __init__(self, architecture: str) -> None:
        self._target, self._shared_memory = TARGETS[architecture]
        # The JIT keeps what it compiled by device: each architecture is a device of its own.
        self._device = list(TARGETS).index(architecture)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": self._shared_memory},
            # Module, function, registers, spills, and the largest number of threads.
            load_binary=lambda name, binary, shared_memory, device: (name, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls to launch one compiled kernel."""
        return lambda *_: None


@contextmanager
def active(make_driver: Callable[[], Any]) -> Iterator[None]:
    """Triton compiles for the GPU of a driver meanwhile, and launches through it.

    Raises:
        RuntimeError: kernels are interpreted.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted; unset it to compile them")
    try:
        triton.runtime.driver.set_active(make_driver())
        registration.forget_plans()
        yield
    finally:
        registration.forget_plans()
        # Not `reset_active`, which would look for a GPU.
        triton.runtime.driver._active = None


@contextmanager
def dry_run(architecture: str) -> Iterator[list[Launch]]:
    """Compile for `architecture` whatever is launched meanwhile, and yield the list that launches go to."""
    launches: list[Launch] = []
    target = TARGETS[architecture][0]
    call = launch.Launch.__call__
    # How kernels multiply depends on the GPU, and on the vendor for whose GPUs PyTorch is built.
    on_amd = target.backend == "hip"
    capability = launch.capability if on_amd else lambda: divmod(target.arch, 10)

    def record(self: launch.Launch, *tensors: Tensor | None) -> None:
        call(self, *tensors)
        if not launch.on_meta(tensors):
            values = dict(zip(self.kernel.arg_names, (*tensors, *self.numbers), strict=False))
            compiled = self.compile(*tensors)
            launches.append(Launch(self.kernel.fn.__name__, compiled, self.programs, values | self.constants))

    with (
        active(lambda: DryDriver(architecture)),
        mock.patch.object(torch.version, "hip", "of the target" if on_amd else None),
        mock.patch.object(launch, "capability", capability),
        mock.patch.object(launch.Launch, "__call__", record),
    ):
        yield launches
