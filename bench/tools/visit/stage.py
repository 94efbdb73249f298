"""What the three stages share: the machine, the kernels that were carried there, and those to carry back."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ... import results, tables
from . import compilations, kernel_cache, parts

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# What travels to the machine beside the code: archives of kernels, and the names of tests that failed.
LUGGAGE = parts.ROOT / ".visit/luggage"
# The environment of tests. Without a GPU kernels are interpreted: it is set before a plug-in imports Triton.
HOW_TO_TEST = {} if ON_GPU else {"TRITON_INTERPRET": "1"}
# Workers of pytest-xdist, each with a context on the GPU and a gigabyte of memory for PyTorch itself.
PROCESSES = 8 if ON_GPU else 0


@contextmanager
def stage(name: str) -> Iterator[Path]:
    """Yield the folder for results, the program's argument; at the end pack what was compiled."""
    out, cache = Path(sys.argv[1]), Path(os.environ["TRITON_CACHE_DIR"])
    print(f"== {name}{'' if ON_GPU else ': a rehearsal without a GPU'}", flush=True)
    about = results.provenance(DEVICE)
    print(tables.machine(about), flush=True)
    if ON_GPU and about["clocks"]:
        print(f"clocks of multiprocessors and memory: {about['clocks']}", flush=True)
    for archive in sorted(LUGGAGE.glob("*.tar.xz")):
        try:
            count = kernel_cache.unpack(archive, cache)
            print(f"{archive.name}: key {kernel_cache.key()} matches; {count} entries", flush=True)
        except ValueError as error:
            print(error, flush=True)
    carried = kernel_cache.entries(cache)
    try:
        yield out
    except KeyboardInterrupt:
        print("== stopped at the limit", flush=True)
    print(compilations.report(Path(os.environ[compilations.VARIABLE])), flush=True)
    new = kernel_cache.pack(cache, out / f"{name}-kernels.tar.xz", carried, preset=1)
    print(f"{new} new entries of the cache in {name}-kernels.tar.xz", flush=True)
