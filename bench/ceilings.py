"""The most that PyTorch reaches on this device: bytes moved and operations, per second."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import timing

# Far more than any cache holds.
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
MATRIX = {"cpu": 1024, "cuda": 8192}
ROUNDS = 5


class Ceilings(NamedTuple):
    """The rates of a large copy, reading and writing, and of a large matrix product in the dtype that is timed."""

    gb_per_s: float
    tflop_per_s: float

    def floor_milliseconds(self, moved: float, flops: float) -> float:
        """The roofline's time: the longer of moving `moved` bytes and computing `flops` operations."""
        return max(moved / (self.gb_per_s * 1e6), flops / (self.tflop_per_s * 1e9))


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    size = COPIED_BYTES.get(device.type, COPIED_BYTES["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    samples = timing.interleave(
        {"copy": lambda _: target.copy_(source), "product": lambda _: a @ b}, ROUNDS, warmup=2, device=device
    )
    copy, product = min(samples["copy"]), min(samples["product"])
    return Ceilings(2 * size / copy / 1e6, 2 * side**3 / product / 1e9)
