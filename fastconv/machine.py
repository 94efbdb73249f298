"""What this machine has: versions of packages, and devices."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def package_version(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions that results depend on, by package."""
    packages = ("fastconv", "torch", "triton", "torchvision")
    return {"python": platform.python_version(), **{name: package_version(name) for name in packages}}


def available_devices() -> dict[str, str]:
    """Return the devices that PyTorch can use, with their names."""
    devices = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        devices["mps"] = "mps"
    return {**devices, "cpu": "cpu"}


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def architecture(device: torch.device) -> str:
    """Return what a GPU's kernels are compiled for, such as "sm_90" or "gfx942"; else the device's type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def choose_device(name: str) -> torch.device:
    """Return the device of that name, or for "auto" a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    devices = available_devices()
    if name == "auto":
        return torch.device(next(iter(devices)))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected auto, {', '.join(devices)}") from error
    if name not in devices and not (name == "cuda" and "cuda:0" in devices):
        raise ValueError(f"device is {name!r}; this machine has {', '.join(devices)}")
    return device


def memory(device: torch.device) -> int | None:
    """Return the bytes of memory that a GPU, or else the machine, has; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Windows has no sysconf.
    except (AttributeError, ValueError, OSError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory cannot be had; on a CPU PyTorch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def keep_freed_memory() -> None:
    """Stop glibc from returning the memory of each step to the system, only to ask for it again in the next.

    Its allocator adapts to the largest block ever freed, up to 32 MiB. Harmless with any other.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
