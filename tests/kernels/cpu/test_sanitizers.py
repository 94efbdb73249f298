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
import torch
import fastconv
from builds import PATCHES, SIZES, used
from cases import draw_leaves
from fastconv.accuracy import in_format
from fastconv.operations import functional

def differentiate(operation, tensors, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    getattr(functional, operation)(**leaves, **options).sum().backward()

with used(sys.argv[1]), fastconv.backend("native"):
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for layout in ("contiguous", "batch_last"):
            for sizes in SIZES:
                for operation in ("convnext_block", "depthwise_conv_layer_norm", "layer_norm", "pointwise_conv_gelu"):
                    tensors = draw_leaves(operation, sizes)
                    tensors["x"] = in_format(tensors["x"], layout)
                    for norm in ("tensor", "sample"):
                        options = {} if operation == "pointwise_conv_gelu" else {"norm": norm}
                        differentiate(operation, tensors, **options)
            for images, inputs, height, width, outputs, patch in PATCHES:
                x = in_format(torch.randn(images, inputs, height, width), layout)
                weight = torch.randn(outputs, inputs, *patch)
                differentiate("patch_conv", {"x": x, "weight": weight, "bias": torch.randn(outputs)})
    with torch.no_grad():
        functional.convnext_block(**draw_leaves("convnext_block", SIZES[0]))
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
    paths = [Path(__file__).parent, Path(__file__).parents[2]]
    done = run_python(
        "-c",
        f"import sys; sys.path[:0] = {[*map(str, paths)]}\n{RUN}",
        library,
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    assert done.returncode == 0, done.stderr[-4000:]


def runtime_of(program):
    """AddressSanitizer's, which has to be loaded before all others."""
    found = subprocess.run([program, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    return found.stdout.strip()
