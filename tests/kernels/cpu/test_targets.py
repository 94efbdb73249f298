"""The same numbers from other vectors and compilers than this machine's; and targets only compiled for."""

import functools
import shutil
import subprocess

import builds
import pytest
import torch
from cases import assert_operation_accurate
from oracle import assert_accurate

import fastconv
from fastconv.accuracy import compare
from fastconv.kernels.cpu import compiler, library
from fastconv.operations import functional

pytestmark = pytest.mark.slow

# Compiler, and the flags after its own.
BUILDS = {
    "4 lanes": ("g++", "-DLANES=4"),
    # The tiles that AVX-512 has.
    "16 lanes": ("g++", "-DLANES=16", "-DREGISTERS=32"),
    "few optimisations": ("g++", "-O1"),
    "clang": ("clang++",),
}
TARGETS = {
    "AVX-512": ("g++", "-march=skylake-avx512"),
    "AVX-512, clang": ("clang++", "-march=skylake-avx512"),
    "SSE": ("g++", "-march=x86-64"),
    "NEON": ("aarch64-linux-gnu-g++", "-march=armv8-a"),
}


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    program, *flags = BUILDS[request.param]
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")
    path = tmp_path_factory.mktemp("build") / "kernels.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", program)
        builds.compile_kernels(path, *flags)
        patch.setattr(torch, "get_num_threads", lambda: 3)
        with builds.used(path), fastconv.backend("native"):
            yield


@pytest.mark.usefixtures("build", "poisoned")
@pytest.mark.parametrize("norm", ["tensor", "sample"])
@pytest.mark.parametrize("operation", ["convnext_block", "depthwise_conv_layer_norm", "layer_norm"])
def test_normed(operation, norm):
    for sizes in builds.SIZES:
        assert_operation_accurate(operation, sizes, norm=norm, affine=False, samples=1)


@pytest.mark.usefixtures("build", "poisoned")
@pytest.mark.parametrize("approximate", functional.APPROXIMATIONS)
def test_pointwise_conv_gelu(approximate):
    for sizes in builds.SIZES:
        assert_operation_accurate("pointwise_conv_gelu", sizes, approximate=approximate, samples=1)


@pytest.mark.usefixtures("build", "poisoned")
def test_patch_conv():
    def conv(x, weight, bias):
        return torch.nn.functional.conv2d(x, weight, bias, stride=weight.shape[2:])

    for images, inputs, height, width, outputs, patch in builds.PATCHES:
        x, weight = torch.randn(images, inputs, height, width), torch.randn(outputs, inputs, *patch)
        tensors = x, weight, torch.randn(outputs)
        names = "x", "weight", "bias"
        assert_accurate(functools.partial(compare, functional.patch_conv, conv, tensors, names), samples=1)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for(target, tmp_path):
    program, *flags = TARGETS[target]
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")
    command = program, *compiler.FLAGS, *flags
    preprocessed = subprocess.run([*command, "-E", "-x", "c++", "/dev/null"], check=False, capture_output=True)
    if preprocessed.returncode != 0:
        pytest.skip(f"{program} does not take {' '.join(flags)}")
    found = compiler.Compiler(command, "", "")
    compiler.compile_sources(found, sorted(library.SOURCES.glob("*.cpp")), tmp_path / "kernels.so")
