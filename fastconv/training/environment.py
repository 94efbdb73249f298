"""What besides recipe and data decides the last bits of a run's weights."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fastconv import machine
from fastconv.kernels.cpu import library
from fastconv.operations import backends


@dataclass(frozen=True)
class Environment:
    """Where a run is computed.

    Args:
        device: "cpu", or a GPU's name.
        backend: what `fastconv.backend` is set to.
        threads: PyTorch's number of threads, in whose order a CPU adds up sums.
        processes: that share the batches.
        versions: by package; and a digest of the CPU kernels, where they run.
    """

    device: str
    backend: str
    threads: int
    processes: int
    versions: dict[str, str]

    @classmethod
    def now(cls, device: torch.device, processes: int = 1) -> Environment:
        backend, versions = backends.current(), machine.versions()
        if backends.first_that_can(device, torch.float32) == "native":
            versions["CPU kernels"] = library.describe().key[:16]
        return cls(machine.gpu_name(device), backend, torch.get_num_threads(), processes, versions)

    def changes(self, later: Environment) -> list[str]:
        """Return what differs from a later environment and can change a result, a few words for each."""
        pairs = {"device": (self.device, later.device), "backend": (self.backend, later.backend)}
        pairs["processes"] = str(self.processes), str(later.processes)
        if self.device == later.device == "cpu":
            pairs["threads"] = str(self.threads), str(later.threads)
        for package in {**self.versions, **later.versions}:
            pairs[package] = self.versions.get(package, "none"), later.versions.get(package, "none")
        return [f"{name} {before}, now {after}" for name, (before, after) in pairs.items() if before != after]


def restore_threads(threads: int, processes: int, device: torch.device) -> None:
    """Compute with as many threads in each process as before, if it is on a CPU that has as many cores.

    Args:
        processes: how many are on this machine.
    """
    # More threads than cores would be far slower, and a file may name any number.
    if device.type == "cpu" and 1 <= threads <= max(1, (os.cpu_count() or 1) // processes):
        torch.set_num_threads(threads)
