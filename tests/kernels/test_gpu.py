"""What only a GPU can show of the Triton kernels; `test_triton.py` compares their numbers there too."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import fastconv
from fastconv.operations import backends, functional, reference

pytestmark = pytest.mark.gpu

CUDA = "cuda"


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    # Some of cuDNN's weight gradients are sums in any order: no two runs are equal.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with fastconv.backend("triton"):
        yield


def gradients(model, x, labels):
    """The loss and the gradient of each parameter, of one training step."""
    loss = F.cross_entropy(model(x), labels)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def example(images=32, norm="tensor"):
    model = fastconv.Classifier(width=16, depth=2, norm=norm).to(CUDA)
    return model, torch.rand(images, 3, 32, 32, device=CUDA), torch.randint(10, (images,), device=CUDA)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_auto_takes_triton_but_for_float64():
    x = torch.zeros(1, 1, 1, 1, device=CUDA)
    with fastconv.backend("auto"):
        for operation in backends.OPERATIONS:
            assert backends.select(operation, x.device, x.dtype) == "triton"
            assert backends.select(operation, x.device, torch.float64) == "portable"


def test_float64_is_refused_where_triton_is_forced():
    with pytest.raises(fastconv.BackendUnavailable, match="do not take float64"):
        functional.layer_norm(torch.ones(1, 2, 1, 1, device=CUDA, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["tensor", "channel"])
def test_a_cuda_graph_replays_the_same(dtype, norm):
    model, x, labels = example(norm=norm)

    def step():
        with torch.autocast(CUDA, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return gradients(model, x, labels)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        x.copy_(torch.rand_like(x))
        graph.replay()
        assert equal(captured, step())


def test_the_host_never_waits():
    model, x, labels = example()
    gradients(model, x, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(model, x, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams():
    model, x, labels = example()
    other = torch.rand_like(x)
    alone = gradients(model, x, labels), gradients(model, other, labels)
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    together = []
    for stream, images in zip(streams, (x, other), strict=True):
        with torch.cuda.stream(stream):
            together.append(gradients(model, images, labels))
    torch.cuda.synchronize()
    assert equal(together[0], alone[0])
    assert equal(together[1], alone[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one():
    model, x, labels = example()
    expected = gradients(model, x, labels)
    found = gradients(copy.deepcopy(model).to("cuda:1"), x.to("cuda:1"), labels.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.to(CUDA), b)


def test_more_than_2_31_elements():
    """The last image of a huge batch, beside the same image alone."""
    images, channels, side = 525_000, 64, 4
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("less than 40 GB of free GPU memory")
    block = fastconv.ConvNextBlock(channels, norm="sample", kernel_size=3).to(CUDA, torch.bfloat16)
    x = torch.randn(images, channels, side, side, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    assert images * 4 * channels * side**2 > 2**31
    y = block(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    last = x.detach()[-1:].clone().requires_grad_()
    expected = block(last)
    assert torch.equal(y[-1:], expected)
    assert torch.equal(grad[-1:], torch.autograd.grad(expected.sum(), last)[0])


# A planned step; then maps of the kernels that multiply by Toeplitz matrices, of the stencils, and of one pixel.
SANITIZED = """
import torch, fastconv
from fastconv.bench.tools.planned import PlannedSteps, Sizes
from fastconv.functional import layer_norm, pointwise_conv_gelu
for dtype in (torch.float32, torch.bfloat16):
    steps = PlannedSteps(dtype, "cuda", Sizes(images=7, side=9, width=3, depth=1, patch=2))
    for plan in (steps.training(), steps.evaluation()):
        steps.repeated(plan)(0)
    for shape in [(7, 3, 5, 7), (2, 3, 17, 18), (1, 4, 1, 1)]:
        for norm in ("tensor", "sample", "channel"):
            block = fastconv.ConvNextBlock(shape[1], norm=norm).to("cuda", dtype)
            depthwise = fastconv.DepthwiseConvLayerNorm(shape[1], norm=norm).to("cuda", dtype)
            x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
            weight = torch.randn(4, shape[1], 1, 1, device="cuda", dtype=dtype, requires_grad=True)
            with fastconv.backend("triton"):
                y = pointwise_conv_gelu(layer_norm(x, norm=norm), weight)
                (block(x).sum() + depthwise(x).sum() + y.sum()).backward()
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, record_property):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    # PyTorch's allocator would hand out parts of larger blocks, within which an overrun is none for the sanitizer.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    record_property("found", done.stdout.strip().rpartition("\n")[2])
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
def test_training_stays_within_the_spread_of_the_reference():
    """Losses of 100 steps on images that can be told apart, from three seeds."""
    curves = {}
    for name in ("triton", "reference"):
        for seed in range(3):
            torch.manual_seed(seed)
            prototypes = torch.rand(10, 3, 32, 32, device=CUDA)
            model = (fastconv if name == "triton" else reference).Classifier(width=16, depth=2).to(CUDA)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            losses = []
            for _ in range(100):
                labels = torch.randint(10, (64,), device=CUDA)
                x = 0.3 * prototypes[labels] + 0.7 * torch.rand(64, 3, 32, 32, device=CUDA)
                loss = F.cross_entropy(model(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            curves[name, seed] = torch.stack(losses).cpu()
    spread = max(
        (curves["reference", a] - curves["reference", b]).abs().mean() for a in range(3) for b in range(a)
    )
    for seed in range(3):
        # From one seed both start with the same weights and see the same images.
        assert (curves["triton", seed] - curves["reference", seed]).abs().mean() < spread
        assert curves["triton", seed][-10:].mean() < 0.8 * curves["triton", seed][:10].mean()


def test_wrong_devices_are_named():
    with pytest.raises(ValueError, match="weight is on cpu, x on cuda"):
        functional.pointwise_conv_gelu(torch.ones(1, 2, 1, 1, device=CUDA), torch.ones(3, 2, 1, 1))
