"""Launches through Triton's own launcher, over a libcuda that runs nothing: what a GPU would be given."""

import shutil
from pathlib import Path

import pytest
from processes import printed_by

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="Triton needs a C compiler")

ROOT = Path(__file__).parents[2]

# Beside each launch the same by Triton's JIT, which must give the driver the same bits.
COMPARED = """
import ctypes, torch
from bench.tools.null_gpu import null_gpu
from fastconv.kernels import operations
from fastconv.kernels.common import launch
from fastconv.kernels.common.values import Convolution, Norm

SIZES = {"i1": 1, "i32": 4, "i64": 8, "fp32": 4}
call = launch.Launch.__call__
compared = []

def last(count):
    found = (ctypes.c_uint64 * (5 + count))()
    library.null_last(found)
    return list(found)

def compare(self, *tensors):
    if any(x is not None and x.is_meta for x in tensors):
        before = library.null_launches()
        call(self, *tensors)
        assert library.null_launches() == before, (self.kernel.fn.__name__, "launched without memory")
        return
    arguments = (*tensors, *self.numbers)
    signature = self.compile(*tensors).src.signature.values()
    sizes = [8 if type_[0] == "*" else SIZES[type_] for type_ in signature if type_ != "constexpr"]
    library.null_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    self.kernel[(self.programs,)](*arguments, **(launch.COMPILER_OPTIONS | self.constants))
    expected, before = last(len(sizes)), library.null_launches()
    for _ in range(2):
        call(self, *tensors)
        assert last(len(sizes)) == expected, (self.kernel.fn.__name__, last(len(sizes)), expected)
    assert library.null_launches() == before + 2
    compared.append(self.kernel.fn.__name__)

def run(function, *sizes, aligned=True):
    def tensor(size):
        # One element beyond the 64 bytes that PyTorch aligns to.
        return torch.empty(1 + torch.Size(size).numel())[1:].view(size) if not aligned else torch.empty(size)
    leaves = [None if size is None else tensor(size).requires_grad_() for size in sizes]
    y = function(*leaves)
    torch.autograd.grad(y, [x for x in leaves if x is not None], torch.empty_like(y))

def convnext_block(x, *parameters):
    convolutions = [Convolution(*parameters[i : i + 2]) for i in (0, 2, 4)]
    return operations.convnext_block(x, *convolutions, Norm("tensor", 1e-5, None, None), "none")

def pointwise(x, weight):
    return operations.pointwise_conv_gelu(x, Convolution(weight, None), "none")

with null_gpu() as library:
    launch.Launch.__call__ = compare
    block = (3, 8, 5, 3), (16, 1, 3, 3), (16,), (8, 16, 1, 1), None, (8, 8, 1, 1), (8,)
    for aligned in (True, False):
        run(convnext_block, *block, aligned=aligned)
    run(pointwise, (1, 16, 1, 1), (4, 16, 1, 1))
    run(lambda x: operations.layer_norm(x, Norm("channel", 1e-5, None, None)), (2, 16, 3, 3))
print(*compared)
"""

# Triton's profiler learns of launches by hooks.
HOOKED = """
import torch, triton
from bench.tools.null_gpu import null_gpu
from fastconv.kernels import operations
from fastconv.kernels.common.values import Norm

seen = []
enter = lambda metadata: seen.append(metadata.get()["name"])
x, norm = torch.empty(2, 16, 3, 3), Norm("tensor", 1e-5, None, None)
with null_gpu() as library:
    operations.layer_norm(x, norm)
    before = library.null_launches()
    triton.knobs.runtime.launch_enter_hook.add(enter)
    operations.layer_norm(x, norm)
    triton.knobs.runtime.launch_enter_hook.remove(enter)
    operations.layer_norm(x, norm)
    assert library.null_launches() == before + 4
print(*seen)
"""


# A CUDA graph must not capture what compiling and loading does.
PREPARED = """
import torch
from bench.tools.null_gpu import null_gpu
from fastconv.kernels.layer_norm.tiling import LayerNormTiling

x = torch.empty(2, 16, 3, 3)
norm = LayerNormTiling(x, "tensor")
tensors = x, norm.new_moments(x)
with null_gpu() as library:
    launch = norm.moments(x)
    launch.prepare(*tensors)
    before = library.null_launches()
    launch.compile = None
    launch(*tensors)
    print(before, library.null_launches())
"""


def printed(code):
    return printed_by("-c", code, cwd=ROOT, TRITON_INTERPRET="0").split()


def test_a_launch_gives_the_driver_what_the_jit_gives_it():
    block = [
        "depthwise_forward",
        "norm_mlp_residual",
        "norm_mlp_residual_backward",
        "depthwise_backward",
        "reduce_partials",
    ]
    pointwise = ["pointwise_gelu", "pointwise_gelu_backward_x", "pointwise_gelu_backward_weight"]
    assert printed(COMPARED) == [*block, *block, *pointwise, "channel_norm", "channel_norm_backward"]


def test_a_prepared_launch_compiles_no_more():
    assert printed(PREPARED) == ["0", "1"]


def test_hooks_on_launches_are_called():
    assert printed(HOOKED) == ["norm_moments", "normalise"]
