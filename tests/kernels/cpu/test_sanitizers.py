"""No kernel accesses memory out of bounds or has undefined behaviour, as GCC's sanitizers find them.

Memory of PyTorch's and the parts of a kernel's workspace (`Arena` in sources/chunks.h) lie apart in such a build.
"""

import shutil
import subprocess
from pathlib import Path

import builds
import pytest
from processes import run_python

from fastconv.kernels.cpu.library import Unavailable

SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1"

# Each operation, forward and backward.
RUN = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
import fastconv
from builds import PATCHES, SIZES, used
from cases import draw
from fastconv.accuracy import in_format
from fastconv.kernels.common import ranks
from fastconv.operations import functional

# As in a group of one process.
ranks.place_in, ranks.all_reduce = lambda group: (0, 1), lambda x, group: x.clone()
NORMS = {"norm": "tensor"}, {"norm": "sample"}, {"norm": "tensor", "process_group": "one"}
NORMED = "convnext_block", "depthwise_conv_layer_norm", "layer_norm"

def differentiate(operation, tensors, layout, **options):
    leaves = {name: x.detach() for name, x in tensors.items() if x is not None}
    leaves["x"] = in_format(leaves["x"], layout)
    with torch.no_grad():
        getattr(functional, operation)(**leaves, **options)
    for leaf in leaves.values():
        leaf.requires_grad_()
    getattr(functional, operation)(**leaves, **options).sum().backward()

def run(layout):
    for sizes in SIZES:
        for norm in NORMS:
            for operation in NORMED:
                differentiate(operation, draw(operation, sizes), layout, **norm)
        for approximate in functional.APPROXIMATIONS:
            operation = "pointwise_conv_gelu"
            differentiate(operation, draw(operation, sizes), layout, approximate=approximate)
    for *shape, outputs, patch in PATCHES:
        weight = torch.randn(outputs, shape[1], *patch)
        tensors = {"x": torch.randn(shape), "weight": weight, "bias": torch.randn(outputs)}
        differentiate("patch_conv", tensors, layout)

with used(sys.argv[1]), fastconv.backend("native"):
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for layout in ("contiguous", "batch_last"):
            run(layout)
"""


@pytest.mark.slow
def test_no_access_out_of_bounds_and_nothing_undefined(tmp_path, monkeypatch):
    if (program := shutil.which("g++")) is None:
        pytest.skip("there is no g++")
    monkeypatch.setenv("CXX", program)
    library, runtime = tmp_path / "kernels.so", runtime_of(program)
    try:
        builds.compile_kernels(library, *SANITIZERS)
    except Unavailable as error:
        pytest.skip(f"g++ has no sanitizers: {error}")
    done = run_python(
        "-c",
        RUN,
        library,
        Path(__file__).parent,
        Path(__file__).parents[2],
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert done.returncode == 0, done.stderr[-4000:]


def runtime_of(program):
    """AddressSanitizer's, which has to be loaded before all others."""
    found = subprocess.run([program, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    return found.stdout.strip()
