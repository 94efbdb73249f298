"""The kernels for maps of any size and for the norm of each pixel, against float64: interpreted, and on a GPU."""

import functools
import itertools

import pytest
import torch
from cases import assert_operation_accurate, draw, draw_leaves

from fastconv.accuracy import FORMATS, in_format
from fastconv.checking.inputs import Sizes
from fastconv.operations import functional

pytest.importorskip("triton")
from fastconv.kernels import decisions
from fastconv.kernels.channel_norm import tiling as channel_norm_tiling
from fastconv.kernels.stencil import tiling as stencil_tiling

# images, channels, height, width, multiplier, kernel: small, because the interpreter is slow.
SHAPES = {
    "7x7 taps": Sizes(1, 5, 3, 7, 1, (7, 7)),
    "several strips": Sizes(1, 3, 2, 19, 1, (3, 5)),
    "map smaller than the kernel": Sizes(2, 4, 2, 3, 1, (5, 9)),
    "more rows of taps than a program sums": Sizes(1, 3, 2, 3, 1, (11, 11)),
    "multiplier": Sizes(2, 3, 3, 4, 3, (3, 3)),
    "wide": Sizes(1, 130, 1, 2, 1, (3, 3)),
    "three chunks of channels": Sizes(2, 40, 2, 9, 1, (3, 3)),
    "blocks of channels": Sizes(1, 80, 3, 2, 1, (3, 3)),
    "one pixel": Sizes(3, 7, 1, 1, 2, (3, 3)),
    "one channel": Sizes(2, 1, 3, 2, 1, (3, 3)),
    "one tap": Sizes(2, 5, 2, 3, 1, (1, 1)),
}
DEPTHWISE = "depthwise_conv_layer_norm"
# With ConvNeXt's eps.
assert_few_accurate = functools.partial(assert_operation_accurate, samples=2, norm="channel", eps=1e-6)

pytestmark = pytest.mark.usefixtures("device", "poisoned")


def depthwise(x, weight, bias, norm_weight, norm_bias, eps=1e-6):
    norm = {"norm": "channel", "eps": eps, "norm_weight": norm_weight, "norm_bias": norm_bias}
    return functional.depthwise_conv_layer_norm(x, weight, bias, **norm)


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("name", SHAPES)
def test_depthwise_conv_channel_norm(name, affine, device):
    assert_few_accurate(DEPTHWISE, SHAPES[name], affine=affine, bias=affine, device=device)


@pytest.mark.parametrize("norm", ["tensor", "sample"])
def test_large_maps(norm, device, monkeypatch):
    monkeypatch.setattr(decisions, "LARGEST_TOEPLITZ_MAP", 5)
    for name in ("7x7 taps", "multiplier", "map smaller than the kernel"):
        assert_few_accurate(DEPTHWISE, SHAPES[name], norm=norm, device=device)


@pytest.mark.parametrize("layout", FORMATS)
def test_memory_formats(layout, device):
    for operation in (DEPTHWISE, "layer_norm"):
        assert_few_accurate(operation, SHAPES["multiplier"], layout, device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    for operation, layout in ((DEPTHWISE, "channels_last"), ("layer_norm", "contiguous")):
        assert_few_accurate(operation, SHAPES["multiplier"], layout, dtype=dtype, device=device, samples=4)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 70, 5, 3), (5, 1, 2, 3)], ids=str)
def test_channel_norm(shape, device):
    assert_few_accurate("layer_norm", Sizes(*shape, 1, (1, 1)), device=device)


def test_mean_a_thousand_times_the_standard_deviation(device):
    for operation in (DEPTHWISE, "layer_norm"):
        assert_few_accurate(operation, SHAPES["multiplier"], mean=1000.0, device=device)


def test_more_rows_than_programs_keep_partial_sums_for(device, monkeypatch):
    monkeypatch.setattr(stencil_tiling, "PROGRAMS_OF_TAPS", 2)
    monkeypatch.setattr(channel_norm_tiling, "PROGRAMS", 2)
    assert_few_accurate(DEPTHWISE, Sizes(3, 5, 3, 2, 1, (3, 3)), device=device)


@pytest.mark.parametrize("name", SHAPES)
def test_wide_strips_of_several_rows_where_there_are_many(name, device, monkeypatch):
    monkeypatch.setattr(stencil_tiling, "PROGRAMS_FOR_SEVERAL_LINES", 1)
    monkeypatch.setattr(stencil_tiling, "PROGRAMS_FOR_WIDE_STRIPS", 1)
    sizes = SHAPES[name]._replace(images=3 * SHAPES[name].images)
    assert_few_accurate(DEPTHWISE, sizes, device=device)


@pytest.mark.parametrize(
    ("channels", "chunks"),
    [(40, (3, 16)), (96, (3, 32)), (128, (1, 128)), (160, (3, 64)), (1536, (3, 512)), (2048, (2, 1024))],
)
def test_chunks_hold_the_channels_with_few_left_over(channels, chunks):
    assert stencil_tiling.chunks_of(channels) == chunks


@pytest.mark.parametrize("channels", [5, 1025, 2560, 3073, 4096])
def test_no_program_has_more_threads_than_a_gpu(channels):
    x, weight = torch.empty(64, channels, 7, 7), torch.empty(channels, 1, 7, 7)
    chunks, block = stencil_tiling.chunks_of(channels)
    assert chunks * block >= channels
    _, warps = stencil_tiling.StencilTiling(x, weight)._lines_and_warps(block, 1)
    # AMD's have 64 lanes.
    assert 64 * warps <= 1024


def test_channels_too_wide_for_one_program(device, monkeypatch):
    monkeypatch.setattr(decisions, "WIDEST_CHANNEL_NORM", 4)
    for layout in ("contiguous", "channels_last"):
        assert_few_accurate(DEPTHWISE, SHAPES["multiplier"], layout, device=device)


def test_convnext_block(device):
    assert_few_accurate("convnext_block", SHAPES["multiplier"], device=device)


def test_wide_pointwise_convolutions_are_products_of_the_vendor(device, monkeypatch):
    monkeypatch.setattr(decisions, "LARGEST_POINTWISE", 10)
    for layout in ("contiguous", "channels_last"):
        assert_operation_accurate(
            "pointwise_conv_gelu", Sizes(2, 5, 3, 4, 1, (1, 1)), layout, device=device, samples=2
        )


def test_gradients_of_any_layout_alone_and_together(device):
    leaves = list(draw_leaves(DEPTHWISE, SHAPES["multiplier"], device).values())
    y = depthwise(*leaves)
    grad = torch.randn(y.shape, device=device)
    expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for layout in FORMATS[1:]:
        found = torch.autograd.grad(y, leaves, in_format(grad, layout), retain_graph=True)
        # On a GPU not bit by bit: of another layout Triton sums in another order.
        torch.testing.assert_close(found, expected, **({} if device == "cuda" else {"rtol": 0, "atol": 0}))
    for i in range(len(leaves)):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        (found,) = torch.autograd.grad(depthwise(*alone), alone[i], grad)
        assert torch.equal(found, expected[i])


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_nothing_is_kept_without_gradients(affine, device):
    inputs = draw(DEPTHWISE, SHAPES["multiplier"], device, affine=affine).values()
    operator = torch.ops.fastconv.depthwise_conv_channel_norm
    _, *kept = operator(*inputs, 1e-6, False)
    assert [tensor.numel() for tensor in kept] == [0, 0]
    y, normalised, scale = operator(*inputs, 1e-6, True)
    # Without an affine map y itself is what the backward needs.
    assert normalised.numel() == (y.numel() if affine else 0)
    assert scale.shape == (2 * 3 * 4,)


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_gradcheck(affine, device):
    if device == "cuda":
        pytest.skip("the kernels do not take float64 on a GPU")
    inputs = draw(DEPTHWISE, Sizes(1, 2, 2, 2, 1, (3, 3)), dtype=torch.float64, affine=affine).values()
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(functools.partial(depthwise, eps=1e-2), leaves)


def registered(device):
    x, *parameters = draw_leaves(DEPTHWISE, Sizes(2, 3, 2, 4, 2, (3, 3)), device).values()
    vectors = torch.rand(3, device=device, requires_grad=True), torch.rand(3, device=device, requires_grad=True)
    return {
        "depthwise_conv": (x, *parameters[:2]),
        "depthwise_conv_channel_norm": (x, *parameters, 1e-6, True),
        "channel_norm": (x, *vectors, 1e-6),
    }


@pytest.mark.parametrize(
    ("name", "layout"),
    list(itertools.product(registered("cpu"), ["contiguous", "channels_last"])),
)
def test_registered_operators(name, layout, device):
    x, *rest = registered(device)[name]
    x = in_format(x.detach(), layout).requires_grad_()
    torch.library.opcheck(getattr(torch.ops.fastconv, name).default, (x, *rest))
