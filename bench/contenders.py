"""What is compared: PyTorch's ways to run the reference, and ours to run the fused module."""

from __future__ import annotations

from typing import NamedTuple

import torch

BASELINE = "eager"


class Contender(NamedTuple):
    """A way to run a workload.

    Args:
        fused: runs our module instead of the reference.
        channels_last: has maps and weights in that memory format.
        compile_mode: torch.compile's mode; None if it is not compiled.
        graph: captured in a CUDA graph by us, and replayed.
        gpu_only: left out on a CPU, where it would be the same as another.
    """

    name: str
    fused: bool = False
    channels_last: bool = False
    compile_mode: str | None = None
    graph: bool = False
    gpu_only: bool = False

    @property
    def uses_graphs(self) -> bool:
        return self.graph or self.compile_mode == "reduce-overhead"


EAGER = Contender(BASELINE)
FASTCONV = Contender("fastconv", fused=True)
CONTENDERS = (
    EAGER,
    Contender("eager channels_last", channels_last=True),
    Contender("compile", compile_mode="default"),
    # Without CUDA graphs, to compare kernels.
    Contender("compile max-autotune", compile_mode="max-autotune-no-cudagraphs"),
    Contender("compile reduce-overhead", compile_mode="reduce-overhead", gpu_only=True),
    Contender("eager in a CUDA graph", graph=True, gpu_only=True),
    FASTCONV,
    Contender("fastconv compiled", fused=True, compile_mode="default"),
    Contender("fastconv in a CUDA graph", fused=True, graph=True, gpu_only=True),
)
QUICK = (
    BASELINE,
    "eager channels_last",
    "compile",
    "eager in a CUDA graph",
    "fastconv",
    "fastconv in a CUDA graph",
)


def choose(device: torch.device, quick: bool) -> list[Contender]:
    return [
        contender
        for contender in CONTENDERS
        if (device.type == "cuda" or not contender.gpu_only) and (not quick or contender.name in QUICK)
    ]
