"""The C++ kernel of the block, against float64."""

import pytest
import torch
from cases import assert_operation_accurate, draw_leaves, results

from fastconv.checking.inputs import Sizes
from fastconv.kernels.cpu import block
from fastconv.operations import functional

# images, channels, height, width, multiplier, kernel. A vector has 4, 8 or 16 images, a chunk 16 or more.
SIZES = {
    "lecture 8x8": Sizes(32, 3, 8, 8, 4, (7, 7)),
    "lecture 4x4": Sizes(21, 5, 4, 4, 4, (7, 7)),
    "chunks of several lines": Sizes(300, 2, 2, 2, 4, (7, 7)),
    "more outputs than rows at once": Sizes(5, 2, 5, 4, 9, (7, 7)),
    "a last group of channels": Sizes(9, 11, 3, 6, 1, (7, 7)),
    "map smaller than the kernel": Sizes(7, 3, 2, 3, 3, (9, 5)),
    "framed, in several segments": Sizes(17, 3, 5, 19, 2, (3, 7)),
    "framed, narrow": Sizes(4, 2, 6, 3, 3, (5, 3)),
    "one tap": Sizes(10, 3, 3, 4, 2, (1, 1)),
    "one image": Sizes(1, 3, 7, 7, 2, (7, 7)),
    "one pixel": Sizes(6, 3, 1, 1, 2, (7, 7)),
}
NORMS = "tensor", "sample"

pytestmark = pytest.mark.usefixtures("native", "poisoned")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SIZES)
def test_block(name, norm):
    assert_operation_accurate("convnext_block", SIZES[name], norm=norm, samples=1)


@pytest.mark.parametrize("width", range(1, 10))
@pytest.mark.parametrize("height", [1, 4, 9])
def test_every_width_has_its_own_convolution(height, width):
    sizes = Sizes(5, 2, height, width, 3, (7, 7))
    assert_operation_accurate("convnext_block", sizes, norm="tensor", samples=1)


@pytest.mark.parametrize("options", [{"bias": False}, {"affine": False}, {"mean": 1000.0}])
@pytest.mark.parametrize("norm", NORMS)
def test_parameters_and_means(norm, options):
    assert_operation_accurate("convnext_block", SIZES["lecture 8x8"], norm=norm, **options)


@pytest.mark.parametrize("approximate", functional.APPROXIMATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "batch_last"])
def test_layouts(layout, approximate):
    assert_operation_accurate("convnext_block", SIZES["lecture 4x4"], layout, approximate=approximate, samples=1)


def block_results(name, norm="tensor", needed=None):
    """The output and the gradients of all tensors, or of those that are needed; the same for each call."""
    torch.manual_seed(0)
    leaves = draw_leaves("convnext_block", SIZES[name])
    grad = torch.randn(leaves["x"].shape)
    fixed = {key: leaf.detach() for key, leaf in leaves.items() if needed and key not in needed}
    asked = {key: leaf for key, leaf in leaves.items() if key not in fixed}
    return results(lambda **tensors: functional.convnext_block(**tensors, **fixed, norm=norm), asked, grad)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_with_the_same_number_of_threads(norm, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    first, second = block_results("chunks of several lines", norm), block_results("chunks of several lines", norm)
    assert all(map(torch.equal, first, second))


def test_threads_change_only_the_order_of_sums(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = block_results("chunks of several lines")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for ours, expected in zip(block_results("chunks of several lines"), one, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("needed", [("x",), ("depthwise_bias",), ("depthwise_weight",), ("pointwise_weight", "x")])
def test_only_the_needed_gradients(needed):
    names = list(draw_leaves("convnext_block", SIZES["lecture 4x4"]))
    every = dict(zip(["output", *names], block_results("lecture 4x4"), strict=True))
    some = block_results("lecture 4x4", needed=needed)
    expected = [every["output"], *(every[name] for name in names if name in needed)]
    assert all(map(torch.equal, some, expected))


def test_without_gradients_the_same_bits():
    leaves = draw_leaves("convnext_block", SIZES["lecture 8x8"])
    with_gradients = functional.convnext_block(**leaves)
    with torch.no_grad():
        assert torch.equal(functional.convnext_block(**leaves), with_gradients)


def test_norm_sample_keeps_images_apart():
    leaves = draw_leaves("convnext_block", SIZES["lecture 8x8"])
    leaves["x"].data[5] = float("nan")
    y = functional.convnext_block(**leaves, norm="sample")
    found = y.isnan().flatten(1).any(1)
    assert found.tolist() == [i == 5 for i in range(len(found))]


def test_compiled_by_torch_compile():
    leaves = draw_leaves("convnext_block", SIZES["lecture 8x8"])
    grad = torch.randn(leaves["x"].shape)
    compiled = torch.compile(lambda **tensors: functional.convnext_block(**tensors), fullgraph=True)
    for ours, expected in zip(
        results(compiled, leaves, grad), results(functional.convnext_block, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_operators_keep_the_rules_of_pytorch():
    with torch.no_grad():
        x, taps, shift, weight, bias, projection, offset, *_ = draw_leaves(
            "convnext_block", SIZES["lecture 4x4"]
        ).values()
    arguments = x, taps, shift, weight, bias, projection, offset, "tensor", 1e-5, None, "none", True
    torch.library.opcheck(block.convnext_block._registered, arguments)
