"""The kernels for maps of any size and for the norm of each pixel, against float64: interpreted, and on a GPU."""

import functools
import itertools

import pytest
import torch
from cases import block
from oracle import assert_accurate

import fastconv
from fastconv.accuracy import FORMATS, as_dtype, compare, in_format, outputs_and_grads
from fastconv.operations import functional, reference

pytest.importorskip("triton")
from fastconv.kernels import decisions
from fastconv.kernels.channel_norm import tiling as channel_norm_tiling
from fastconv.kernels.stencil import tiling as stencil_tiling

# images, channels, height, width, multiplier, kernel: small, because the interpreter is slow.
SHAPES = {
    "7x7 taps": (1, 5, 3, 7, 1, (7, 7)),
    "several strips": (1, 3, 2, 19, 1, (3, 5)),
    "map smaller than the kernel": (2, 4, 2, 3, 1, (5, 9)),
    "more rows of taps than a program sums": (1, 3, 2, 3, 1, (11, 11)),
    "multiplier": (2, 3, 3, 4, 3, (3, 3)),
    "wide": (1, 130, 1, 2, 1, (3, 3)),
    "three chunks of channels": (2, 40, 2, 9, 1, (3, 3)),
    "blocks of channels": (1, 80, 3, 2, 1, (3, 3)),
    "one pixel": (3, 7, 1, 1, 2, (3, 3)),
    "one channel": (2, 1, 3, 2, 1, (3, 3)),
    "one tap": (2, 5, 2, 3, 1, (1, 1)),
}
NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")
FEW = functools.partial(assert_accurate, samples=2)


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device(request, monkeypatch):
    # What PyTorch computes in float32 is to be float32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with fastconv.backend("triton"):
        yield request.param


@pytest.fixture(autouse=True)
def _new_memory_holds_nan():
    """What a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_inputs(shape, affine=True, bias=True):
    images, channels, height, width, multiplier, kernel = shape
    outputs = channels * multiplier
    weight = torch.randn(outputs, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5
    vectors = [torch.randn(outputs) if bias else None]
    vectors += [torch.rand(outputs) + 0.5, torch.randn(outputs)] if affine else [None, None]
    return [torch.randn(images, channels, height, width), weight, *vectors]


def depthwise(module, norm="channel", eps=1e-6):
    def call(x, weight, bias, norm_weight, norm_bias):
        options = {"norm": norm, "eps": eps, "norm_weight": norm_weight, "norm_bias": norm_bias}
        return module.depthwise_conv_layer_norm(x, weight, bias, **options)

    return call


def norm_alone(module):
    def call(x, norm_weight, norm_bias):
        return module.layer_norm(x, norm="channel", eps=1e-6, norm_weight=norm_weight, norm_bias=norm_bias)

    return call


def sampler(shape, device, layout="contiguous", dtype=torch.float32, norm="channel", **options):
    return lambda: compare(
        depthwise(functional, norm),
        depthwise(reference, norm),
        random_inputs(shape, **options),
        NAMES,
        layout,
        dtype=dtype,
        device=device,
    )


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("name", SHAPES)
def test_depthwise_conv_channel_norm(name, affine, device):
    FEW(sampler(SHAPES[name], device, affine=affine, bias=affine))


@pytest.mark.parametrize("norm", ["tensor", "sample"])
def test_large_maps(norm, device, monkeypatch):
    monkeypatch.setattr(decisions, "LARGEST_TOEPLITZ_MAP", 5)
    for name in ("7x7 taps", "multiplier", "map smaller than the kernel"):
        FEW(sampler(SHAPES[name], device, norm=norm))


@pytest.mark.parametrize("layout", FORMATS)
def test_memory_formats(layout, device):
    FEW(sampler(SHAPES["multiplier"], device, layout))
    inputs, names = [torch.randn(3, 5, 4, 2), torch.rand(5) + 0.5, torch.randn(5)], ["x", *NAMES[3:]]
    FEW(lambda: compare(norm_alone(functional), norm_alone(reference), inputs, names, layout, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    assert_accurate(sampler(SHAPES["multiplier"], device, "channels_last", dtype), dtype, samples=4)
    inputs, names = [torch.randn(3, 5, 4, 2), torch.rand(5) + 0.5, torch.randn(5)], ["x", *NAMES[3:]]
    ours, definition = norm_alone(functional), norm_alone(reference)
    assert_accurate(lambda: compare(ours, definition, inputs, names, dtype=dtype, device=device), dtype, samples=4)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 70, 5, 3), (5, 1, 2, 3)], ids=str)
def test_channel_norm(shape, device):
    def sample():
        inputs = [torch.randn(shape), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])]
        return compare(norm_alone(functional), norm_alone(reference), inputs, ["x", *NAMES[3:]], device=device)

    FEW(sample)


def test_mean_a_thousand_times_the_standard_deviation(device):
    def sample():
        x, weight, bias, *affine = random_inputs(SHAPES["multiplier"])
        inputs = [x, weight, bias + 1000, *affine]
        return compare(depthwise(functional), depthwise(reference), inputs, NAMES, device=device)

    FEW(sample)

    def sample_norm():
        inputs = [torch.randn(2, 9, 3, 2) + 1000, torch.rand(9) + 0.5, torch.randn(9)]
        return compare(norm_alone(functional), norm_alone(reference), inputs, ["x", *NAMES[3:]], device=device)

    FEW(sample_norm)


def test_more_rows_than_programs_keep_partial_sums_for(device, monkeypatch):
    monkeypatch.setattr(stencil_tiling, "PROGRAMS_OF_TAPS", 2)
    monkeypatch.setattr(channel_norm_tiling, "PROGRAMS", 2)
    FEW(sampler((3, 5, 3, 2, 1, (3, 3)), device))


@pytest.mark.parametrize("name", SHAPES)
def test_wide_strips_of_several_rows_where_there_are_many(name, device, monkeypatch):
    monkeypatch.setattr(stencil_tiling, "PROGRAMS_FOR_SEVERAL_LINES", 1)
    monkeypatch.setattr(stencil_tiling, "PROGRAMS_FOR_WIDE_STRIPS", 1)
    images, *shape = SHAPES[name]
    FEW(sampler((3 * images, *shape), device))


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
        FEW(sampler(SHAPES["multiplier"], device, layout))


def test_convnext_block(device):
    def sample():
        x, *depthwise_parameters, norm_weight, norm_bias = random_inputs(SHAPES["multiplier"])
        mixing = [torch.randn(4, 9, 1, 1) / 3, torch.randn(4), torch.randn(3, 4, 1, 1) / 2, torch.randn(3)]
        inputs = [x, *depthwise_parameters, *mixing, norm_weight, norm_bias]
        names = ["x", "depthwise_weight", "depthwise_bias", "w", "b", "projection", "offset", *NAMES[3:]]
        ours, definition = (block(module, "channel") for module in (functional, reference))
        return compare(ours, definition, inputs, names, device=device)

    FEW(sample)


def test_wide_pointwise_convolutions_are_products_of_the_vendor(device, monkeypatch):
    monkeypatch.setattr(decisions, "LARGEST_POINTWISE", 10)

    def sample(layout):
        inputs = [torch.randn(2, 5, 3, 4), torch.randn(4, 5, 1, 1), torch.randn(4)]
        ours, definition = functional.pointwise_conv_gelu, reference.pointwise_conv_gelu
        return compare(ours, definition, inputs, ["x", "weight", "bias"], layout, device=device)

    for layout in ("contiguous", "channels_last"):
        FEW(functools.partial(sample, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last, sliced"])
def test_results_have_the_memory_format_of_the_input(layout, device):
    x, *parameters = random_inputs(SHAPES["multiplier"])
    layout, *sliced = layout.split(", ")
    x = in_format(x.to(device), layout)
    x = (x[:, :, 1:, 1:] if sliced else x).requires_grad_()
    parameters = [parameter.to(device) for parameter in parameters]
    for y in (depthwise(functional)(x, *parameters), functional.layer_norm(x, norm="channel")):
        for result in (y, *torch.autograd.grad(y.square().sum(), x)):
            assert result.is_contiguous() == (layout == "contiguous")
            assert result.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def leaves_of(shape, device, **options):
    return [x.to(device).requires_grad_() for x in random_inputs(shape, **options)]


def test_gradients_of_any_layout_alone_and_together(device):
    leaves = leaves_of(SHAPES["multiplier"], device)
    y = depthwise(functional)(*leaves)
    grad = torch.randn(y.shape, device=device)
    before = grad.clone()
    expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for layout in FORMATS[1:]:
        found = torch.autograd.grad(y, leaves, in_format(grad, layout), retain_graph=True)
        # On a GPU not bit by bit: of another layout Triton sums in another order.
        torch.testing.assert_close(found, expected, **({} if device == "cuda" else {"rtol": 0, "atol": 0}))
    assert torch.equal(grad, before)
    for i in range(len(leaves)):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        (found,) = torch.autograd.grad(depthwise(functional)(*alone), alone[i], grad)
        assert torch.equal(found, expected[i])
    dense = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), leaves), dense, strict=True))


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_nothing_is_kept_without_gradients(affine, device):
    inputs = [None if x is None else x.to(device) for x in random_inputs(SHAPES["multiplier"], affine=affine)]
    operator = torch.ops.fastconv.depthwise_conv_channel_norm
    _, *kept = operator(*inputs, 1e-6, False)
    assert [tensor.numel() for tensor in kept] == [0, 0]
    y, normalised, scale = operator(*inputs, 1e-6, True)
    # Without an affine map y itself is what the backward needs.
    assert normalised.numel() == (y.numel() if affine else 0)
    assert scale.shape == (2 * 3 * 4,)


def test_empty_batch(device):
    leaves = leaves_of((0, 3, 4, 4, 2, (3, 3)), device)
    for y in (depthwise(functional)(*leaves), functional.layer_norm(leaves[0], norm="channel")):
        assert y.shape == (0, y.shape[1], 4, 4)
    grads = torch.autograd.grad(depthwise(functional)(*leaves).sum(), leaves)
    assert all(torch.equal(grad, torch.zeros_like(x)) for grad, x in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_gradcheck(affine, device):
    inputs = as_dtype(random_inputs((1, 2, 2, 2, 1, (3, 3)), affine=affine), torch.float64)
    if device == "cuda":
        pytest.skip("the kernels do not take float64 on a GPU")
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(depthwise(functional, eps=1e-2), leaves)


def registered(device):
    x, *parameters = [x.to(device).requires_grad_() for x in random_inputs((2, 3, 2, 4, 2, (3, 3)))]
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


def test_compile_without_graph_breaks(device):
    torch.compiler.reset()
    compiled = torch.compile(depthwise(functional), fullgraph=True, backend="aot_eager")
    for images in (1, 2):
        inputs = [x.to(device) for x in random_inputs((images, 3, 2, 3, 1, (3, 3)))]
        grad = torch.randn(images, 3, 2, 3, device=device)
        expected = outputs_and_grads(depthwise(functional), inputs, grad)
        found = outputs_and_grads(compiled, inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_double_backward_raises(device):
    leaves = leaves_of((1, 2, 1, 2, 1, (3, 3)), device)
    for y in (depthwise(functional)(*leaves), functional.layer_norm(leaves[0], norm="channel")):
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(y.sum(), leaves[0], create_graph=True)


def test_images_2_31_apart(device):
    """Only the pages that the few elements lie on are ever touched."""
    far = torch.empty(2**31 + 2**10, dtype=torch.float16, device=device).as_strided((2, 3, 2, 2), (2**31, 1, 6, 3))
    x, *parameters = (x.to(device).half() for x in random_inputs((2, 3, 2, 2, 1, (3, 3))))
    with torch.no_grad():
        far.copy_(x)
    grad = torch.empty_like(far).copy_(torch.randn_like(x))
    operation = functools.partial(normed, parameters=parameters)
    found, expected = (outputs_and_grads(operation, [maps], grad) for maps in (far, x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pixels_2_30_apart(device):
    """The left edge of a kernel lies further from them than 32 bits reach."""
    far = torch.empty(2**30 + 2**10, dtype=torch.float16, device=device).as_strided((2, 3, 2, 2), (6, 1, 3, 2**30))
    x, *parameters = (x.to(device).half() for x in random_inputs((2, 3, 2, 2, 1, (7, 7))))
    with torch.no_grad():
        far.copy_(x)
    grad = torch.randn_like(x)
    operation = functools.partial(normed, parameters=parameters)
    found, expected = (outputs_and_grads(operation, [maps], grad) for maps in (far, x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def normed(x, parameters):
    return depthwise(functional)(x, *parameters)
