"""The Triton kernels behind the public operations, against float64: interpreted on a CPU, and again on a GPU."""

import functools
import itertools

import pytest
import torch
from cases import NORMED, SHAPES, assert_gradcheck, assert_operation_accurate, draw, draw_leaves, results
from oracle import assert_accurate

import fastconv
from fastconv import accuracy
from fastconv.accuracy import FORMATS, compare, outputs_and_grads
from fastconv.checking.inputs import Sizes
from fastconv.operations import functional, reference

pytest.importorskip("triton")
import triton

from fastconv.kernels import decisions, operations
from fastconv.kernels.common import launch, registration
from fastconv.kernels.common.layout import memory_format

# The third, "channel", has kernels of its own: see test_stencil.py.
NORMS = ("tensor", "sample")
SMALL_MAPS = [name for name, shape in SHAPES.items() if shape[2] * shape[3] <= 256]
# The interpreter takes up to a second for a sample. In float32 one will do: the floor is far above its rounding.
SAMPLES = 1 if triton.knobs.runtime.interpret else accuracy.SAMPLES
assert_one_accurate = functools.partial(assert_operation_accurate, samples=SAMPLES)

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SMALL_MAPS)
@pytest.mark.parametrize("operation", ["convnext_block", "depthwise_conv_layer_norm"])
def test_convolution_and_norm(operation, name, norm, device, poisoned):
    # Each operation has each norm, with an affine map and without.
    affine = (norm == "sample") == (operation == "convnext_block")
    assert_one_accurate(operation, SHAPES[name], affine=affine, norm=norm, device=device)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_layer_norm(name, norm, device, poisoned):
    assert_one_accurate("layer_norm", SHAPES[name], norm=norm, device=device)


# images, inputs, height, width, outputs: in one tile and in several, of odd and even sizes
POINTWISE = {
    "lecture 4x4": (8, 128, 4, 4, 32),
    "odd and prime": (3, 7, 11, 5, 13),
    "several tiles": (2, 83, 6, 7, 131),
    "one pixel": (3, 5, 1, 1, 17),
    "one input": (2, 1, 3, 3, 4),
    "one output": (1, 19, 3, 2, 1),
}


def pointwise_inputs(shape, bias=True):
    images, channels, height, width, outputs = shape
    sizes = (images, channels, height, width), (outputs, channels, 1, 1), (outputs,)
    inputs = [torch.randn(size) for size in sizes]
    return inputs if bias else [*inputs[:2], None]


def assert_pointwise_accurate(
    shape, device, layout="contiguous", bias=True, dtype=torch.float32, samples=SAMPLES, **options
):
    ours, definition = (
        functools.partial(module.pointwise_conv_gelu, **options) for module in (functional, reference)
    )
    assert_accurate(
        lambda: compare(
            ours, definition, pointwise_inputs(shape, bias), ["x", "weight", "bias"], layout, dtype, device=device
        ),
        dtype,
        samples,
    )


@pytest.mark.parametrize("approximate", functional.APPROXIMATIONS)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_conv_gelu(name, approximate, device, poisoned):
    assert_pointwise_accurate(POINTWISE[name], device, bias=approximate == "none", approximate=approximate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_pointwise_conv_gelu_in_half_precision(layout, dtype, device):
    assert_pointwise_accurate(POINTWISE["odd and prime"], device, layout, dtype=dtype, samples=3)


@pytest.mark.parametrize(
    ("layout", "approximate"), list(zip(FORMATS, itertools.cycle(functional.APPROXIMATIONS), strict=False))
)
@pytest.mark.parametrize("name", ["lecture 4x4", "odd and prime"])
def test_memory_formats(name, layout, approximate, device):
    assert_one_accurate("convnext_block", SHAPES[name], layout, approximate=approximate, device=device)
    assert_one_accurate("depthwise_conv_layer_norm", SHAPES[name], layout, affine=False, device=device)
    assert_pointwise_accurate(SHAPES[name][:5], device, layout, approximate=approximate)


@pytest.mark.parametrize("norm", NORMS)
def test_without_biases(norm, device, poisoned):
    assert_one_accurate(
        "convnext_block", SHAPES["lecture 4x4"], affine=False, bias=False, norm=norm, device=device
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_mean_a_thousand_times_the_standard_deviation(name, norm, device):
    for operation in ("convnext_block", "layer_norm"):
        assert_one_accurate(operation, SHAPES[name], affine=False, mean=1000.0, norm=norm, device=device)


@pytest.mark.parametrize(
    ("name", "norm", "dtype"),
    [
        ("lecture 4x4", "tensor", torch.bfloat16),
        ("lecture 4x4", "sample", torch.float16),
        ("odd and prime", "tensor", torch.float16),
        ("odd and prime", "sample", torch.bfloat16),
    ],
    ids=str,
)
def test_half_precision(name, norm, dtype, device):
    assert_operation_accurate("convnext_block", SHAPES[name], dtype=dtype, norm=norm, device=device)


def test_autocast(device):
    assert_operation_accurate("convnext_block", SHAPES["lecture 4x4"], autocast=True, device=device)


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("highest", 1e-8, 2e-6), ("high", 5e-5, 5e-3), ("medium", 5e-4, 2e-2)]
)
def test_float32_products_are_as_precise_as_pytorch_is_set_to(precision, least, most, device):
    """tf32 keeps 10 bits of float32's mantissa, bfloat16 7."""
    # With fewer channels the gradient of the first bias is nearly zero, and its relative error large.
    tensors = draw("convnext_block", Sizes(16, 4, 8, 8, 4, (7, 7)))
    grad = torch.randn(tensors["x"].shape)

    def computed(function, **place):
        leaves = {name: x.to(**place).requires_grad_() for name, x in tensors.items()}
        return results(function, leaves, grad.to(**place))

    exact = computed(reference.convnext_block, dtype=torch.float64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = computed(functional.convnext_block, device=device)
    finally:
        torch.set_float32_matmul_precision(before)
    # But for the gradient of the last bias, which takes no product.
    for name, a, b in zip(["output", *tensors], found, exact, strict=True):
        if name != "projection_bias":
            assert least < (a.cpu() - b).norm() / b.norm() < most, name


@pytest.mark.parametrize("norm", NORMS)
def test_more_images_than_programs_keep_partial_sums_for(norm, device, monkeypatch, poisoned):
    """Rounds over the images, and moments merged before they are read: what large batches take."""
    monkeypatch.setattr("fastconv.kernels.common.moments.MAX_PARTS", 4)
    monkeypatch.setattr("fastconv.kernels.toeplitz.tiling.MAX_PARTIALS", 3)
    monkeypatch.setattr("fastconv.kernels.block.tiling.MAX_PARTIALS", 3)
    monkeypatch.setattr("fastconv.kernels.pointwise.tiling.MAX_PARTIALS", 3)
    registration.forget_plans()
    sizes = Sizes(140, 3, 2, 3, 2, (3, 3))
    assert_one_accurate("convnext_block", sizes, norm=norm, device=device)
    assert_one_accurate("layer_norm", sizes, affine=False, norm=norm, device=device)
    assert_pointwise_accurate((260, 3, 1, 3, 2), device)


def test_blocks_too_wide_for_one_kernel_are_composed(device, monkeypatch):
    monkeypatch.setattr(decisions, "WIDEST_BLOCK", 3)
    assert_one_accurate("convnext_block", SHAPES["lecture 4x4"], device=device)


@pytest.mark.interpreted
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm, device):
    if device != "cpu":
        pytest.skip("the kernels take float64 in the interpreter only")
    for operation in (*NORMED, "pointwise_conv_gelu"):
        assert_gradcheck(operation, Sizes(2, 2, 2, 3, 2, (3, 3)), norm, fast_mode=True)


@pytest.mark.parametrize(
    ("index", "kernels"),
    [
        (0, {"pointwise_gelu_backward_x"}),
        (1, {"pointwise_gelu_backward_weight", "sum_columns"}),
        (2, {"pointwise_gelu_backward_weight", "sum_columns"}),
    ],
    ids=["x", "weight", "bias"],
)
def test_each_gradient_of_the_pointwise_convolution_takes_its_kernels_only(index, kernels, device, monkeypatch):
    inputs = [x.to(device) for x in pointwise_inputs((3, 7, 5, 7, 4))]
    y = functional.pointwise_conv_gelu(*(x.requires_grad_(i == index) for i, x in enumerate(inputs)))
    launched = record_launches(monkeypatch)
    torch.autograd.grad(y.sum(), inputs[index])
    assert set(launched) == kernels


def record_launches(monkeypatch):
    """{name: constants} of the kernels that are launched from now on."""
    launched = {}
    call = launch.Launch.__call__

    def recorded(self, *tensors):
        if not launch.on_meta(tensors):
            launched[self.kernel.fn.__name__] = self.constants
        call(self, *tensors)

    monkeypatch.setattr(launch.Launch, "__call__", recorded)
    return launched


def test_without_gradients_the_slope_of_gelu_is_not_kept(device, monkeypatch):
    x, *parameters = (x.to(device) for x in pointwise_inputs((3, 7, 5, 7, 4)))
    launched = record_launches(monkeypatch)
    functional.pointwise_conv_gelu(x.requires_grad_(), *parameters)
    assert launched["pointwise_gelu"]["KEEP_SLOPE"]
    with torch.no_grad():
        functional.pointwise_conv_gelu(x, *parameters)
    assert not launched["pointwise_gelu"]["KEEP_SLOPE"]
    functional.pointwise_conv_gelu(x.detach(), *parameters)
    assert not launched["pointwise_gelu"]["KEEP_SLOPE"]


def test_parameters_of_any_strides(device):
    for operation in ("convnext_block", "depthwise_conv_layer_norm", "pointwise_conv_gelu"):
        tensors = draw(operation, SHAPES["lecture 4x4"], device)
        strided = {
            name: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for name, x in tensors.items()
        }
        assert not any(x.is_contiguous() for x in strided.values())
        function = getattr(functional, operation)
        assert torch.equal(function(**strided | {"x": tensors["x"]}), function(**tensors))


@pytest.mark.parametrize(
    ("norm", "kernel", "strides"),
    [
        ("tensor", (3, 3), (1, 2**30, 2, 2)),
        ("tensor", (3, 3), (1, 2, 2**30, 2**30)),
        ("channel", (3, 3), (2**31, 1, 6, 3)),
        # The left edge of a kernel lies further from them than 32 bits reach.
        ("channel", (7, 7), (6, 1, 3, 2**30)),
    ],
    ids=["channels", "pixels", "images, norm of each pixel", "pixels, norm of each pixel"],
)
def test_elements_2_31_apart(norm, kernel, strides, device):
    """Only the pages that the few elements lie on are ever touched."""
    sizes = Sizes(2, 3, 1, 3, 2, kernel)
    far = torch.empty(2**31 + 2**10, dtype=torch.float16, device=device).as_strided(sizes[:4], strides)
    for operation in (*NORMED, "pointwise_conv_gelu"):
        x, *parameters = draw(operation, sizes, device, torch.float16).items()
        # PyTorch's own products, of a block's projection, are other ones in another memory format.
        parameters, near = dict(parameters), x[1].detach().contiguous(memory_format=memory_format(far))
        with torch.no_grad():
            far.copy_(near)
        options = {"norm": norm} if operation in NORMED else {}
        function = functools.partial(getattr(functional, operation), **parameters, **options)
        y = function(near)
        grad = torch.empty_like(far).copy_(torch.randn_like(y)) if y.shape == near.shape else torch.randn_like(y)
        expected, found = (outputs_and_grads(function, [maps], grad) for maps in (near, far))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("norm", functional.NORMS)
def test_compile_without_graph_breaks(norm, device):
    torch.compiler.reset()
    eager = functools.partial(functional.convnext_block, norm=norm)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for images in (4, 6, 9):
        leaves = draw_leaves("convnext_block", Sizes(images, 2, 2, 3, 2, (3, 3)), device)
        grad = torch.randn(leaves["x"].shape, device=device)
        expected = results(eager, leaves, grad)
        # The second batch size is compiled with the size as a symbol; the third is not compiled any more.
        with torch.compiler.set_stance("fail_on_recompile" if images == 9 else "default"):
            found = results(compiled, leaves, grad)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def registered(device):
    """Each registered operator with arguments."""
    x, weight, bias, pointwise, pointwise_bias, projection, projection_bias, *_ = draw(
        "convnext_block", Sizes(4, 2, 2, 3, 2, (3, 3)), device
    ).values()
    rest = pointwise.flatten(1), pointwise_bias, projection.flatten(1), projection_bias
    return {
        "layer_norm": (x, "tensor", 1e-5, None),
        "pointwise_conv_gelu": (x, projection.flatten(1), None, "tanh", True),
        "depthwise_conv_layer_norm": (x, weight, bias, "sample", 1e-5, None),
        "convnext_block": (x, weight, bias, *rest, "tensor", 1e-5, None, "none"),
    }


@pytest.mark.parametrize(
    "name", ["layer_norm", "pointwise_conv_gelu", "depthwise_conv_layer_norm", "convnext_block"]
)
def test_registered_operators(name, device):
    arguments = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in registered(device)[name]
    ]
    torch.library.opcheck(getattr(torch.ops.fastconv, name), arguments)


def test_export(device):
    model = fastconv.ConvNextBlock(4, multiplier=2, kernel_size=3).to(device)
    x = torch.randn(3, 4, 4, 4, device=device)
    batch = {"inputs": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=batch)
    x = torch.randn(5, 4, 4, 4, device=device)
    torch.testing.assert_close(program.module()(x), model(x))


def test_checkpointing_recomputes_the_same(device):
    model = fastconv.ConvNextBlock(4, multiplier=2, kernel_size=3).to(device)
    x = torch.randn(3, 4, 4, 4, device=device)
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    again = torch.autograd.grad(y.sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_distributed_data_parallel_sees_every_gradient(device, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = fastconv.ConvNextBlock(4, multiplier=2, kernel_size=3).to(device)
        x = torch.randn(3, 4, 4, 4, device=device)
        plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain, strict=True))


def test_the_classifier(device):
    model = fastconv.Classifier(width=8, depth=1).to(device)
    plain = reference.Classifier(width=8, depth=1).to(device)
    plain.load_state_dict(model.state_dict())
    x, grad = torch.rand(6, 3, 32, 32, device=device), torch.randn(6, 10, device=device)
    for a, b in zip(
        torch.autograd.grad(model(x), list(model.parameters()), grad),
        torch.autograd.grad(plain(x), list(plain.parameters()), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_kernels_are_what_ran(device, monkeypatch):
    def stop(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(operations, "layer_norm", stop)
    with pytest.raises(ZeroDivisionError):
        functional.layer_norm(torch.ones(1, 1, 1, 1, device=device))
