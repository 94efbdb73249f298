"""`fastconv info`."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.table import Table

from fastconv import machine
from fastconv.commands.options import JsonOption
from fastconv.console import console
from fastconv.kernels.cpu import library
from fastconv.operations import backends, selftest


def info(json_output: JsonOption = False) -> None:
    """Report versions, devices, which backend runs each operation and why, and which kernels are right."""
    devices = machine.available_devices()
    facts: dict[str, Any] = {
        "versions": machine.versions(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "forced_backend": backends.current(),
        "operations": {device: backends.choices(torch.device(device)) for device in devices},
        "kernels": {name: _kernels(torch.device(name)) for name in devices if _has_kernels(name)},
    }
    if json_output:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    shown = console()
    for name, found in facts["versions"].items():
        shown.print(f"{name:<12}{found}")
    shown.print(f"{'devices':<12}{', '.join(devices.values())}; {facts['threads']} threads")
    shown.print(f"{'backend':<12}{backends.current()}\n")
    table = Table("device", "operation", "runs on", "because")
    for device, operations in facts["operations"].items():
        for operation, choice in operations.items():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in choice["refused"].items())
            table.add_row(device, operation, choice["runs"] or "nothing", reasons)
    shown.print(table)
    for device, kernels in facts["kernels"].items():
        shown.print(f"\n{kernels['backend']} kernels on {device}, {kernels['architecture']}: {kernels['status']}")
        if kernels["backend"] == "native":
            threads = "PyTorch's threads" if kernels["parallel"] else "one thread"
            # One line, however long the path.
            line = f"  compiled by {kernels['compiler']}; library: {kernels['library']}; {threads}"
            shown.print(line, soft_wrap=True)
        for subject in kernels["right"]:
            shown.print(f"  right: {subject}")
        for subject, reason in kernels["wrong"].items():
            shown.print(f"  wrong: {subject}: {reason}; auto takes portable")


def _has_kernels(device: str) -> bool:
    if device == "cpu":
        return backends.can_run("native", torch.device(device), torch.float32) is None
    return device.startswith("cuda")


def _kernels(device: torch.device) -> dict[str, Any]:
    if device.type != "cpu":
        return selftest.describe("triton", device)
    found = library.describe()
    return {
        **selftest.describe("native", device),
        "compiler": found.compiler,
        "library": "not kept" if found.path is None else str(found.path),
        "parallel": found.parallel,
    }
