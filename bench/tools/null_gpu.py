"""Triton's own launcher without a GPU, over a libcuda that runs nothing.

Everything between a call in Python and the CUDA driver happens as on a machine with an H100: Triton specialises,
compiles, loads and launches through its own C code. Kernels compute nothing, so tensors may lie on the CPU, and
results mean nothing. It needs a C compiler, as Triton does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from .dry_run import active

_SOURCE = Path(__file__).with_name("null_libcuda.c")


class NullDriver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA's GPUs, with a fixed GPU instead of PyTorch's current one."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def null_gpu() -> Iterator[ctypes.CDLL]:
    """Launch kernels on no GPU meanwhile; yield the library, whose `null_launches()` counts them.

    Raises:
        RuntimeError: kernels are interpreted, or CUDA's own driver is loaded already.
    """
    # Now PyTorch finds no GPU, and does not look again once there is a libcuda.
    torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        library = _build(Path(folder))
        # Triton links what it builds with the library that it finds there.
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder), active(NullDriver):
            yield library


def _build(folder: Path) -> ctypes.CDLL:
    """Compile and load the library, under the name by which Triton looks for the CUDA driver."""
    path = folder / "libcuda.so.1"
    headers = Path(nvidia.__file__).with_name("include")
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{headers}", "-o", path, _SOURCE]
    subprocess.run(command, check=True)
    # Triton links with -lcuda, or in newer versions with the name of the file.
    path.with_suffix("").symlink_to(path)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    try:
        library.null_launches.restype = ctypes.c_long
    except AttributeError as error:
        raise RuntimeError("the CUDA driver is loaded in this process; kernels can run on its GPU") from error
    return library
