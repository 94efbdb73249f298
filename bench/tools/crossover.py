"""Where the depthwise convolution's two forms cross: Toeplitz products, or PyTorch's convolution.

    python -m bench.tools.crossover

times both, forward and backward, each in the layout it likes best, and compares the winner with what
`fastconv.operations.decisions.layout` takes.
"""

from __future__ import annotations

import torch

from fastconv.machine import keep_freed_memory
from fastconv.operations import columns, decisions

from .. import results, tables, timing

# channels, multiplier, side of the map, batch
WORKLOADS = [
    *((32, 4, 8, n) for n in (1, 4, 8, 11, 16, 32, 128, 512)),
    *((64, 4, 4, n) for n in (1, 2, 4, 16, 128, 512)),
    *((32, 4, 10, n) for n in (13, 25)),
    *((32, 4, 11, n) for n in (16, 37)),
    *((32, 4, 12, n) for n in (8, 18, 32, 52, 128)),
    *((384, 1, 12, n) for n in (18, 52)),
    *((64, 4, 7, n) for n in (1, 4)),
    *((64, 4, 16, n) for n in (16, 32, 128)),
    *((64, 1, 16, n) for n in (16, 32, 128)),
    *((768, 1, 7, n) for n in (1, 4, 8, 32)),
    *((384, 1, 14, n) for n in (4, 16, 32)),
    *((96, 1, 28, n) for n in (4,)),
]


def make_call(channels: int, multiplier: int, side: int, batch: int, batch_last: bool):
    geometry = columns.Geometry(channels, side, side, batch_last)
    weight = torch.randn(channels * multiplier, 1, 7, 7)
    x = columns.to_columns(torch.randn(batch, channels, side, side), geometry)
    grad = columns.to_columns(torch.randn(batch, channels * multiplier, side, side), geometry)

    def call(_: int) -> None:
        _, matrix = columns.convolve(x, weight, geometry)
        columns.convolve_backward(grad, x, weight, matrix, geometry, needs_x=True, needs_weight=True)

    return call


def main() -> None:
    keep_freed_memory()
    print(f"{tables.machine(results.provenance(torch.device('cpu')))}\n")
    print("| channels | multiplier | map | batch | Toeplitz ms | convolution ms | taken | its time / the best |")
    print("|---:|---:|---|---:|---:|---:|---|---:|")
    for channels, multiplier, side, batch in WORKLOADS:
        calls = {
            "Toeplitz": make_call(channels, multiplier, side, batch, batch_last=True),
            "convolution": make_call(channels, multiplier, side, batch, batch_last=False),
        }
        samples = timing.interleave(calls, rounds=9, warmup=2)
        times = {name: timing.percentiles(turns).p50 for name, turns in samples.items()}
        form = decisions.layout(batch, side * side)
        taken = "Toeplitz" if form == "batch last" else "convolution"
        print(
            f"| {channels} | {multiplier} | {side} x {side} | {batch} | {times['Toeplitz']:.2f} | "
            f"{times['convolution']:.2f} | {taken} | {times[taken] / min(times.values()):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
