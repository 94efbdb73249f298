"""What this machine has: versions, devices, and which backend runs each operation on them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastconv import backends


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    packages = ("fastconv", "torch", "triton", "torchvision")
    return {"python": platform.python_version(), **{name: package_version(name) for name in packages}}


def available_devices() -> dict[str, str]:
    """The devices that PyTorch can use, with their names."""
    devices = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        devices["mps"] = "mps"
    return {**devices, "cpu": "cpu"}


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def architecture(device: torch.device) -> str:
    """That for which kernels are compiled, as "sm_90" or "gfx942"; of what is no GPU of CUDA, its type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def choose_device(name: str) -> torch.device:
    """Raises ValueError if there is no such device."""
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


def choose_backend(name: str, device: torch.device) -> None:
    """Force a backend; raises BackendUnavailable if it cannot run on `device`."""
    if name != "auto":
        backends.backend(name)
    for operation in backends.OPERATIONS:
        backends.select(operation, device, torch.float32)


def describe() -> dict[str, Any]:
    """Everything that `fastconv info` tells, as JSON can hold it."""
    devices = available_devices()
    return {
        "versions": versions(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "forced_backend": backends.current(),
        "operations": {device: choices(torch.device(device)) for device in devices},
    }


def choices(device: torch.device) -> dict[str, dict[str, Any]]:
    """For each operation the backend that runs it on `device`, None if none can, and why not the others."""
    found = {}
    for operation in backends.OPERATIONS:
        reasons = {name: backends.can_run(name, device, torch.float32) for name in backends.candidates()}
        found[operation] = {
            "runs": next((name for name, reason in reasons.items() if reason is None), None),
            "refused": {name: reason for name, reason in reasons.items() if reason is not None},
        }
    return found
