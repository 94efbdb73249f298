"""Who traces, counts or transforms a model finds PyTorch's own operations, in fused modules and swapped models."""

import copy
import io
import warnings

import pytest
import torch
from torch import func, nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.operations import reference

BATCH = torch.export.Dim("batch", min=2, max=64)


class ChannelNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def pairs():
    convolution = nn.Conv2d(4, 8, 7, padding="same", groups=4)
    return nn.Sequential(convolution, ChannelNorm(8), nn.Conv2d(8, 6, 1), nn.GELU())


def fused_pairs(plain):
    depthwise = fastconv.DepthwiseConvLayerNorm(4, 2, norm="channel", affine=True)
    pointwise = fastconv.PointwiseConvGELU(8, 6)
    convolution, norm, other, _ = plain
    affine = {f"norm_{name}": value for name, value in norm.norm.state_dict().items()}
    depthwise.load_state_dict(convolution.state_dict() | affine)
    pointwise.load_state_dict(other.state_dict())
    return nn.Sequential(depthwise, pointwise)


def fused_classifier(plain):
    ours = fastconv.Classifier(8, 1)
    ours.load_state_dict(plain.state_dict())
    return ours


@pytest.fixture(params=["classifier", "pairs"])
def plain(request):
    return {"classifier": lambda: reference.Classifier(8, 1), "pairs": pairs}[request.param]().eval()


@pytest.fixture
def shape(plain):
    return (3, 32, 32) if isinstance(plain, reference.Classifier) else (4, 6, 5)


@pytest.fixture(params=["fused", "swapped"])
def model(request, plain):
    if request.param == "fused":
        return (fused_classifier if isinstance(plain, reference.Classifier) else fused_pairs)(plain).eval()
    swapped = copy.deepcopy(plain)
    fastconv.swap(swapped)
    return swapped


def check(program, plain, shape, *batches):
    for images in batches:
        x = torch.rand(images, *shape)
        torch.testing.assert_close(program(x), plain(x), rtol=1e-4, atol=1e-5)


def assert_without_fastconv(code):
    assert "fastconv" not in str(code)


def test_symbolic_traces(model, plain, shape):
    program = torch.fx.symbolic_trace(model)
    assert_without_fastconv(program.code)
    check(program, plain, shape, 3, 40)


def test_features_within_blocks():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    plain, x = reference.Classifier(8, 1).eval(), torch.rand(3, 3, 32, 32)
    nodes = ["stem", "conv_block_1.0.conv2", "conv_block_2", "bottleneck"]
    expected = extraction.create_feature_extractor(plain, nodes)(x)
    found = extraction.create_feature_extractor(fused_classifier(plain).eval(), nodes)(x)
    for node in nodes:
        torch.testing.assert_close(found[node], expected[node], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [reference, fastconv.functional], ids=["definition", "fused"])
def test_functions_are_traced_symbolically(module):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, groups=3)

        def forward(self, x):
            return module.depthwise_conv_layer_norm(x, self.conv.weight, norm="sample", eps=1e-3)

    net = Net()
    program = torch.fx.symbolic_trace(net)
    assert_without_fastconv(program.code)
    check(program, net, (3, 4, 5), 2, 5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_jit_traces(model, plain, shape, grad):
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        program = torch.jit.trace(model, torch.rand(3, *shape))
    stream = io.BytesIO()
    torch.jit.save(program, stream)
    stream.seek(0)
    program = torch.jit.load(stream)
    # Classes go by their names.
    assert "fastconv::" not in str(program.inlined_graph)
    check(program, plain, shape, 3, 40)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")
def test_scripts(model, plain, shape):
    program = torch.jit.script(nn.Sequential(model))
    assert program.state_dict().keys() == nn.Sequential(model).state_dict().keys()
    check(program, plain, shape, 3, 40)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(model, plain, shape, strict):
    program = torch.export.export(model, (torch.rand(20, *shape),), dynamic_shapes=({0: BATCH},), strict=strict)
    assert_without_fastconv(program.graph)
    check(program.module(), plain, shape, 3, 40)


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript:DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_onnx(model, plain, shape, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed)
    path = str(tmp_path / "model.onnx")
    batches, dynamic = (3, 40), {"dynamic_shapes": ({0: BATCH},)}
    if not dynamo:
        dynamic = {"dynamic_axes": {"x": {0: "n"}, "y": {0: "n"}}}
        if isinstance(plain, reference.Classifier):
            # That exporter takes no norm of a whole batch whose size is not known.
            batches, dynamic = (20,), {}
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(model, (torch.rand(20, *shape),), path, dynamo=dynamo, verbose=False, **names, **dynamic)
    session = runtime.InferenceSession(path)
    check(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), plain, shape, *batches)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(model, plain, shape, mode):
    program = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(torch.rand(20, *shape))
    assert_without_fastconv(program.code)
    check(program, plain, shape, 20)


def test_fake_tensors(plain, model, shape):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.rand(20, *shape)
        y, expected = model(x), plain(x)
        assert type(y) is type(expected)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        y.sum().backward()


def test_multiplications_are_counted(plain, model, shape):
    counts = []
    for each in (plain, model):
        with FlopCounterMode(display=False) as counter:
            each(torch.rand(20, *shape)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_multiplications_are_counted_by_torchinfo():
    torchinfo = pytest.importorskip("torchinfo")
    plain = reference.Classifier(8, 1)
    swapped = copy.deepcopy(plain)
    fastconv.swap(swapped)
    models = plain, swapped, fastconv.Classifier(8, 1)
    counts = [torchinfo.summary(each, (2, 3, 32, 32), verbose=0).total_mult_adds for each in models]
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.slow
def test_programs_compiled_ahead_of_time(tmp_path):
    plain = reference.ConvNextBlock(4)
    model = fastconv.ConvNextBlock(4).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        program = torch.export.export(model, (torch.rand(20, 4, 6, 5),), dynamic_shapes=({0: BATCH},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        check(torch._inductor.aoti_load_package(path), plain, (4, 6, 5), 3, 40)


def squares(model, x):
    """A function of the model's parameters, by name."""
    return lambda parameters: func.functional_call(model, parameters, (x,)).square().sum()


def per_sample_gradients(model, x):
    def gradients(parameters, image):
        return func.grad(lambda given: squares(model, image[None])(given))(parameters)

    return func.vmap(gradients, (None, 0))(dict(model.named_parameters()), x)


def ensemble(model, x):
    others = [copy.deepcopy(model).requires_grad_(False) for _ in range(2)]
    for parameter in others[1].parameters():
        parameter.mul_(0.5)
    parameters, buffers = func.stack_module_state(others)
    return func.vmap(lambda *state: func.functional_call(model, state, (x,)))(parameters, buffers)


def forward_mode(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos())))


def gradient_penalty(model, x):
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), list(model.parameters()), materialize_grads=True)


def batched_gradients(model, x):
    y = model(x)
    grads = torch.eye(3, y.numel()).view(3, *y.shape)
    return torch.autograd.grad(y, list(model.parameters()), grads, is_grads_batched=True)


# name: called with a model and maps
WAYS = {
    "gradients of parameters": lambda model, x: func.grad(squares(model, x))(dict(model.named_parameters())),
    "tangents of parameters": lambda model, x: func.jvp(
        squares(model, x), (dict(model.named_parameters()),), (dict(model.named_parameters()),)
    ),
    "per-sample gradients": per_sample_gradients,
    "ensemble": ensemble,
    "vmap over images": lambda model, x: func.vmap(lambda image: model(image[None]))(x),
    "forward mode": forward_mode,
    "gradient penalty": gradient_penalty,
    "batched gradients": batched_gradients,
    "jacobian": lambda model, x: jacobian(lambda x: model(x).flatten()[:3], x, vectorize=True),
    "jacfwd of jacrev": lambda model, x: func.jacfwd(func.jacrev(lambda x: model(x).flatten()[0]))(x[:1]),
}
# name: of a model, makes the function that is compiled
COMPILED = {
    "gradients": lambda model: func.grad(lambda x: model(x).square().sum()),
    "vmap": lambda model: func.vmap(lambda image: model(image[None])),
}


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("way", WAYS)
def test_transforms(model, plain, shape, way, backend):
    x = torch.rand(5, *shape)[:, :, :16, :16]
    expected = WAYS[way](plain, x.clone())
    with fastconv.backend(backend):
        assert_close(WAYS[way](model, x.clone()), expected)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_transforms(model, plain, shape, name):
    x = torch.rand(5, *shape)[:, :, :16, :16]
    found = torch.compile(COMPILED[name](model), backend="aot_eager", fullgraph=True, dynamic=False)(x)
    assert_close(found, COMPILED[name](plain)(x))


def assert_close(found, expected):
    """By the norms of their tensors, which are in the same order."""
    pairs = zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True)
    for ours, own in pairs:
        assert (ours - own).norm() <= 1e-3 * own.norm() + 1e-5
