"""Kernels compiled and launched without a GPU: a driver of Triton whose launches do nothing.

Triton asks its driver which GPU to compile for. This driver names one, so Triton specialises and compiles exactly
what a call with tensors on that GPU would compile, here from tensors on the CPU, whose contents do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastconv.kernels.common import launch, registration

# Each GPU, by the name of NVIDIA's or AMD's compiler, and the shared memory that a program can have, in bytes.
TARGETS = {
    "sm_75": (GPUTarget("cuda", 75, 32), 64 * 1024),
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
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
    call, version, capability = launch.Launch.__call__, torch.version.hip, launch.capability

    def record(self: launch.Launch, *tensors: Tensor | None) -> None:
        call(self, *tensors)
        if not launch.on_meta(tensors):
            values = dict(zip(self.kernel.arg_names, (*tensors, *self.numbers), strict=False))
            compiled = self.compile(*tensors)
            launches.append(Launch(self.kernel.fn.__name__, compiled, self.programs, values | self.constants))

    with active(lambda: DryDriver(architecture)):
        try:
            # How kernels multiply depends on the GPU, and on the vendor for whose GPUs PyTorch is built.
            torch.version.hip = "of the target" if target.backend == "hip" else None
            if target.backend == "cuda":
                launch.capability = lambda: divmod(target.arch, 10)
            launch.Launch.__call__ = record  # type: ignore[method-assign]
            yield launches
        finally:
            launch.Launch.__call__ = call  # type: ignore[method-assign]
            torch.version.hip, launch.capability = version, capability
