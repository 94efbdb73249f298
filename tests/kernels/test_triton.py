"""The Triton kernels behind the public operations, against float64: interpreted on a CPU, and again on a GPU."""

import functools
import itertools

import pytest
import torch
from cases import NAMES, SHAPES, block, depthwise, norm_alone, random_block
from oracle import assert_accurate

import fastconv
from fastconv import accuracy
from fastconv.accuracy import FORMATS, as_dtype, compare, in_format, outputs_and_grads
from fastconv.operations import functional, reference

pytest.importorskip("triton")
import triton

from fastconv.kernels import decisions, operations
from fastconv.kernels.common import launch, registration

# The third, "channel", has kernels of its own: see test_stencil.py.
NORMS = ("tensor", "sample")
SMALL_MAPS = [name for name, shape in SHAPES.items() if shape[2] * shape[3] <= 256]
# The interpreter takes up to a second for a sample. In float32 one will do: the floor is far above its rounding.
ONE = functools.partial(assert_accurate, samples=1 if triton.knobs.runtime.interpret else accuracy.SAMPLES)


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


@pytest.fixture
def poisoned():
    """New memory holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on(device, tensors):
    return [None if x is None else x.to(device) for x in tensors]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SMALL_MAPS)
def test_convnext_block(name, norm, device, poisoned):
    def sample():
        inputs = random_block(SHAPES[name], affine=norm == "sample")
        return compare(block(functional, norm), block(reference, norm), inputs, NAMES, device=device)

    ONE(sample)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SMALL_MAPS)
def test_depthwise_conv_layer_norm(name, norm, device, poisoned):
    def sample():
        x, weight, bias, *_, norm_weight, norm_bias = random_block(SHAPES[name], affine=norm == "tensor")
        inputs = [x, weight, bias, norm_weight, norm_bias]
        names = ["x", "weight", "bias", "norm_weight", "norm_bias"]
        return compare(depthwise(functional, norm), depthwise(reference, norm), inputs, names, device=device)

    ONE(sample)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_layer_norm(name, norm, device, poisoned):
    images, channels, height, width, _, _ = SHAPES[name]

    def sample():
        inputs = [torch.randn(images, channels, height, width), *torch.randn(2, channels)]
        names = ["x", "norm_weight", "norm_bias"]
        return compare(norm_alone(functional, norm), norm_alone(reference, norm), inputs, names, device=device)

    ONE(sample)


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


def pointwise(module, approximate="none"):
    return functools.partial(module.pointwise_conv_gelu, approximate=approximate)


@pytest.mark.parametrize("approximate", functional.APPROXIMATIONS)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_conv_gelu(name, approximate, device, poisoned):
    def sample():
        inputs = pointwise_inputs(POINTWISE[name], bias=approximate == "none")
        names = ["x", "weight", "bias"]
        ours, definition = pointwise(functional, approximate), pointwise(reference, approximate)
        return compare(ours, definition, inputs, names, device=device)

    ONE(sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_pointwise_conv_gelu_in_half_precision(layout, dtype, device):
    def sample():
        inputs, names = pointwise_inputs(POINTWISE["odd and prime"]), ["x", "weight", "bias"]
        ours, definition = pointwise(functional), pointwise(reference)
        return compare(ours, definition, inputs, names, layout, dtype=dtype, device=device)

    assert_accurate(sample, dtype, samples=3)


@pytest.mark.parametrize(
    ("layout", "approximate"), list(zip(FORMATS, itertools.cycle(functional.APPROXIMATIONS), strict=False))
)
@pytest.mark.parametrize("name", ["lecture 4x4", "odd and prime"])
def test_memory_formats(name, layout, approximate, device):
    ours, definition = (block(module, approximate=approximate) for module in (functional, reference))
    ONE(lambda: compare(ours, definition, random_block(SHAPES[name]), NAMES, layout, device=device))

    def sample():
        x, weight, bias, *_ = random_block(SHAPES[name])
        inputs = [x, weight, bias, None, None]
        names = ["x", "weight", "bias", "norm_weight", "norm_bias"]
        return compare(depthwise(functional), depthwise(reference), inputs, names, layout, device=device)

    def sample_pointwise():
        inputs, names = pointwise_inputs(SHAPES[name][:5]), ["x", "weight", "bias"]
        ours, definition = pointwise(functional, approximate), pointwise(reference, approximate)
        return compare(ours, definition, inputs, names, layout, device=device)

    ONE(sample)
    ONE(sample_pointwise)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_output_has_the_memory_format_of_the_input(layout, device):
    x, *parameters = on(device, random_block(SHAPES["lecture 8x8"], dtype=torch.float32))
    x = in_format(x, layout)
    for y in (
        block(functional)(x, *parameters),
        depthwise(functional)(x, *parameters[:2], *parameters[-2:]),
        functional.layer_norm(x),
        functional.pointwise_conv_gelu(x, parameters[4]),
    ):
        assert y.is_contiguous() == (layout == "contiguous")
        assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("norm", NORMS)
def test_without_biases(norm, device, poisoned):
    def sample():
        inputs = random_block(SHAPES["lecture 4x4"], affine=False, bias=False)
        return compare(block(functional, norm), block(reference, norm), inputs, NAMES, device=device)

    ONE(sample)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["lecture 8x8", "odd and prime"])
def test_mean_a_thousand_times_the_standard_deviation(name, norm, device):
    def sample_block():
        x, weight, bias, *rest = random_block(SHAPES[name], affine=False)
        inputs = [x, weight * 0.1, bias + 1000, *rest]
        return compare(block(functional, norm), block(reference, norm), inputs, NAMES, device=device)

    def sample_norm():
        x = torch.randn(SHAPES[name][:4]) + 1000
        names = ["x", "norm_weight", "norm_bias"]
        ours, definition = norm_alone(functional, norm), norm_alone(reference, norm)
        return compare(ours, definition, [x, None, None], names, device=device)

    ONE(sample_block)
    ONE(sample_norm)


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
    def sample():
        inputs = random_block(SHAPES[name])
        return compare(block(functional, norm), block(reference, norm), inputs, NAMES, dtype=dtype, device=device)

    assert_accurate(sample, dtype)


def test_autocast(device):
    def sample():
        inputs = random_block(SHAPES["lecture 4x4"])
        return compare(block(functional), block(reference), inputs, NAMES, autocast=True, device=device)

    assert_accurate(sample, torch.bfloat16)


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("highest", 1e-8, 2e-6), ("high", 5e-5, 5e-3), ("medium", 5e-4, 2e-2)]
)
def test_float32_products_are_as_precise_as_pytorch_is_told(precision, least, most, device):
    """tf32 keeps 10 bits of float32's mantissa, bfloat16 7."""
    # With fewer channels the gradient of the first bias is nearly zero, and its relative error large.
    inputs = random_block((16, 4, 8, 8, 4, (7, 7)))
    grad = torch.randn(inputs[0].shape).double()
    exact = outputs_and_grads(block(reference), inputs, grad)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = outputs_and_grads(
            block(functional), on(device, as_dtype(inputs, torch.float32)), grad.float().to(device)
        )
    finally:
        torch.set_float32_matmul_precision(before)
    # But for the gradient of the last bias, which takes no product.
    for name, a, b in zip(["output", *NAMES], found, exact, strict=True):
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
    shape = (140, 3, 2, 3, 2, (3, 3))

    def sample_block():
        return compare(block(functional, norm), block(reference, norm), random_block(shape), NAMES, device=device)

    def sample_norm():
        names = ["x", "norm_weight", "norm_bias"]
        inputs = [torch.randn(shape[:4]), None, None]
        return compare(norm_alone(functional, norm), norm_alone(reference, norm), inputs, names, device=device)

    def sample_pointwise():
        names = ["x", "weight", "bias"]
        inputs = pointwise_inputs((260, 3, 1, 3, 2))
        return compare(pointwise(functional), pointwise(reference), inputs, names, device=device)

    ONE(sample_block)
    ONE(sample_norm)
    ONE(sample_pointwise)


def test_blocks_too_wide_for_one_kernel_are_composed(device, monkeypatch):
    monkeypatch.setattr(decisions, "WIDEST_BLOCK", 3)
    ONE(
        lambda: compare(
            block(functional), block(reference), random_block(SHAPES["lecture 4x4"]), NAMES, device=device
        )
    )


@pytest.mark.parametrize("norm", NORMS)
def test_expanded_gradient(norm, device):
    leaves = [x.requires_grad_() for x in on(device, as_dtype(random_block(SHAPES["lecture 4x4"]), torch.float32))]
    for operation, arguments in [
        (block(functional, norm), leaves),
        (depthwise(functional, norm), [*leaves[:3], *leaves[-2:]]),
        (norm_alone(functional, norm), [leaves[0], *torch.randn(2, 3, device=device)]),
        (pointwise(functional), [leaves[0], leaves[5], leaves[6]]),
    ]:
        y = operation(*arguments)
        wanted = [x for x in arguments if x.requires_grad]
        weights = torch.randn(y.shape[1], device=device)[:, None, None].expand(y.shape)
        dense = torch.autograd.grad(y, wanted, weights.clone())
        expanded = torch.autograd.grad(operation(*arguments), wanted, weights)
        for a, b in zip(expanded, dense, strict=True):
            torch.testing.assert_close(a, b)
        torch.autograd.grad(operation(*arguments).sum(), wanted)


@pytest.mark.parametrize("norm", NORMS)
def test_empty_batch(norm, device):
    shape = (0, 3, 8, 8, 4, (7, 7))
    leaves = [x.requires_grad_() for x in on(device, as_dtype(random_block(shape), torch.float32))]
    for operation, arguments, channels in [
        (block(functional, norm), leaves, 3),
        (depthwise(functional, norm), [*leaves[:3], *leaves[-2:]], 12),
        (norm_alone(functional, norm), [leaves[0], None, None], 3),
        (pointwise(functional), [leaves[0], leaves[5], leaves[6]], 3),
    ]:
        y = operation(*arguments)
        assert y.shape == (0, channels, 8, 8)
        wanted = [x for x in arguments if x is not None]
        for x, grad in zip(wanted, torch.autograd.grad(y.sum(), wanted), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


@pytest.mark.interpreted
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm, device):
    if device != "cpu":
        pytest.skip("the kernels take float64 in the interpreter only")
    leaves = [x.requires_grad_() for x in random_block((2, 2, 2, 3, 2, (3, 3)))]
    check = functools.partial(torch.autograd.gradcheck, fast_mode=True)
    assert check(block(functional, norm), leaves)
    assert check(depthwise(functional, norm), [*leaves[:3], *leaves[-2:]])
    assert check(norm_alone(functional, norm), [leaves[0], *torch.randn(2, 2).double()])
    assert check(functional.pointwise_conv_gelu, [leaves[0], leaves[5], leaves[6]])


def test_each_gradient_by_itself(device):
    inputs = on(device, as_dtype(random_block(SHAPES["lecture 4x4"]), torch.float32))
    grad = torch.randn(inputs[0].shape, device=device)
    all_at_once = outputs_and_grads(block(functional), inputs, grad)[1:]
    for i, expected in enumerate(all_at_once):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        (found,) = torch.autograd.grad(block(functional)(*alone), [alone[i]], grad)
        torch.testing.assert_close(found, expected)


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
    inputs = on(device, pointwise_inputs((3, 7, 5, 7, 4)))
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
    x, *parameters = on(device, pointwise_inputs((3, 7, 5, 7, 4)))
    launched = record_launches(monkeypatch)
    functional.pointwise_conv_gelu(x.requires_grad_(), *parameters)
    assert launched["pointwise_gelu"]["KEEP_SLOPE"]
    with torch.no_grad():
        functional.pointwise_conv_gelu(x, *parameters)
    assert not launched["pointwise_gelu"]["KEEP_SLOPE"]
    functional.pointwise_conv_gelu(x.detach(), *parameters)
    assert not launched["pointwise_gelu"]["KEEP_SLOPE"]


@pytest.mark.parametrize("norm", NORMS)
def test_results_repeat_bit_for_bit_and_leave_the_gradient_alone(norm, device):
    leaves = [x.requires_grad_() for x in on(device, as_dtype(random_block(SHAPES["lecture 8x8"]), torch.float32))]
    grad = torch.randn(leaves[0].shape, device=device)
    before = grad.clone()
    first, second = (
        [y, *torch.autograd.grad(y, leaves, grad)] for y in (block(functional, norm)(*leaves) for _ in range(2))
    )
    assert torch.equal(grad, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parameters_of_any_strides(device):
    inputs = on(device, as_dtype(random_block(SHAPES["lecture 4x4"]), torch.float32))
    strided = [inputs[0], *(torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in inputs[1:])]
    assert not any(x.is_contiguous() for x in strided[1:])
    assert torch.equal(block(functional)(*strided), block(functional)(*inputs))
    for operation, which in [(depthwise(functional), (0, 1, 2, 7, 8)), (pointwise(functional), (0, 5, 6))]:
        assert torch.equal(operation(*(strided[i] for i in which)), operation(*(inputs[i] for i in which)))


@pytest.mark.parametrize("strides", [(1, 2**30, 2, 2), (1, 2, 2**30, 2**30)], ids=["channels", "pixels"])
def test_elements_2_31_apart(strides, device):
    """Only the pages that the few elements lie on are ever touched."""
    far = torch.empty(2**31 + 2**10, dtype=torch.float16, device=device).as_strided((2, 3, 1, 3), strides)
    x, *parameters = on(device, as_dtype(random_block((2, 3, 1, 3, 2, (3, 3))), torch.float16))
    with torch.no_grad():
        far.copy_(x)
    for operation, arguments in [
        (block(functional), parameters),
        (depthwise(functional), [*parameters[:2], *parameters[-2:]]),
        (norm_alone(functional), [None, None]),
        (pointwise(functional), [parameters[4]]),
    ]:
        y = operation(x, *arguments)
        grad = torch.empty_like(far).copy_(torch.randn_like(y)) if y.shape == x.shape else torch.randn_like(y)
        expected = outputs_and_grads(lambda x, f=operation, a=arguments: f(x, *a), [x], grad)
        found = outputs_and_grads(lambda x, f=operation, a=arguments: f(x, *a), [far], grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_double_backward_raises(device):
    leaves = [x.requires_grad_() for x in on(device, as_dtype(random_block(SHAPES["lecture 4x4"]), torch.float32))]
    for loss in (torch.sum, torch.linalg.vector_norm):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(loss(block(functional)(*leaves)), leaves[:1], create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(mode, device):
    inputs = on(device, as_dtype(random_block(SHAPES["lecture 8x8"]), torch.float32))
    expected = block(functional)(*[x.detach().requires_grad_() for x in inputs])
    with mode():
        y = block(functional)(*inputs)
    assert not y.requires_grad
    assert torch.equal(y, expected)


def test_results_may_be_changed_in_place(device):
    parameters = on(device, as_dtype(random_block(SHAPES["lecture 4x4"]), torch.float32))
    grads = []
    for change in (torch.relu_, torch.relu):
        x = parameters[0].detach().requires_grad_()
        y = block(functional)(x, *parameters[1:])
        grads.append(torch.autograd.grad(change(y).square().sum(), x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("norm", NORMS)
def test_compile_without_graph_breaks(norm, device):
    torch.compiler.reset()
    compiled = torch.compile(block(functional, norm), fullgraph=True, backend="aot_eager")
    for images in (4, 6, 9):
        inputs = on(device, as_dtype(random_block((images, 2, 2, 3, 2, (3, 3))), torch.float32))
        grad = torch.randn(inputs[0].shape, device=device)
        expected = outputs_and_grads(block(functional, norm), inputs, grad)
        # The second batch size is compiled with the size as a symbol; the third is not compiled any more.
        with torch.compiler.set_stance("fail_on_recompile" if images == 9 else "default"):
            found = outputs_and_grads(compiled, inputs, grad)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def registered(device):
    """Each registered operator with arguments."""
    x, weight, bias, pointwise, pointwise_bias, projection, projection_bias, *_ = on(
        device, as_dtype(random_block((4, 2, 2, 3, 2, (3, 3))), torch.float32)
    )
    rest = pointwise.flatten(1), pointwise_bias, projection.flatten(1), projection_bias
    return {
        "layer_norm": (x, "tensor", 1e-5),
        "pointwise_conv_gelu": (x, projection.flatten(1), None, "tanh", True),
        "depthwise_conv_layer_norm": (x, weight, bias, "sample", 1e-5),
        "convnext_block": (x, weight, bias, *rest, "tensor", 1e-5, "none"),
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
