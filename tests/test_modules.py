"""The modules: drop-in for the lecture's, with the same parameters, values and gradients."""

import copy
import functools
import pickle

import pytest
import torch
from oracle import assert_accurate
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.operations import backends, functional, reference

CLASSIFIERS = {
    "lecture": ({}, (4, 3, 32, 32)),
    "homework": ({"width": 8, "depth": 1, "patch": 2}, (3, 3, 16, 16)),
    "other data": ({"width": 6, "depth": 2, "patch": 3, "in_channels": 1, "num_classes": 7}, (9, 1, 19, 14)),
}


@pytest.fixture(autouse=True, params=["portable", "reference"])
def backend(request):
    if request.param == "native" and (reason := backends.can_run("native", torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    with fastconv.backend(request.param):
        yield request.param


def loss_and_grads(model, x, labels):
    logits = model(x)
    loss = F.cross_entropy(logits, labels)
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_is_the_lectures(name):
    options, size = CLASSIFIERS[name]
    lecture, ours = reference.Classifier(**options), fastconv.Classifier(**options)
    ours.load_state_dict(lecture.state_dict(), strict=True)
    names = ["logits", *dict(lecture.named_parameters())]
    exact_model = copy.deepcopy(lecture).double()

    def sample():
        x, labels = torch.rand(size), torch.randint(options.get("num_classes", 10), size[:1])
        mine, other = loss_and_grads(ours, x, labels), loss_and_grads(lecture, x, labels)
        exact = loss_and_grads(exact_model, x.double(), labels)
        return dict(zip(names, zip(mine, other, exact, strict=True), strict=True))

    assert_accurate(sample)


def test_state_dict_both_ways():
    lecture, ours = reference.Classifier(), fastconv.Classifier()
    ours.load_state_dict(lecture.state_dict(), strict=True)
    lecture.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(lecture.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == 235_434


def test_a_seed_gives_the_lectures_initial_weights():
    torch.manual_seed(3)
    lecture = reference.Classifier().state_dict()
    torch.manual_seed(3)
    ours = fastconv.Classifier().state_dict()
    assert all(torch.equal(ours[name], value) for name, value in lecture.items())


def test_blocks_drop_into_the_lectures_classifier():
    model = reference.Classifier(width=8, depth=2)
    x = torch.rand(5, 3, 32, 32)
    expected = model(x)
    for blocks in (model.conv_block_1, model.conv_block_2):
        for i, block in enumerate(blocks):
            blocks[i] = fastconv.ConvNextBlock(block.conv1.in_channels)
            blocks[i].load_state_dict(block.state_dict())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_separate_modules_compose_to_the_block():
    block = fastconv.ConvNextBlock(4, multiplier=3, kernel_size=5, norm="sample", eps=1e-3, affine=True)
    nn.init.normal_(block.norm_weight)
    nn.init.normal_(block.norm_bias)
    depthwise = fastconv.DepthwiseConvLayerNorm(4, 3, 5, norm="sample", eps=1e-3, affine=True)
    pointwise = fastconv.PointwiseConvGELU(12, 4)
    norm = {"norm_weight": block.norm_weight, "norm_bias": block.norm_bias}
    depthwise.load_state_dict(block.conv1.state_dict() | norm)
    pointwise.load_state_dict(block.conv2.state_dict())
    x = torch.randn(2, 4, 6, 9)
    torch.testing.assert_close(block(x), x + block.conv3(pointwise(depthwise(x))), rtol=1e-4, atol=1e-5)


def test_depthwise_conv_layer_norm_is_convolution_then_norm():
    module = fastconv.DepthwiseConvLayerNorm(5, multiplier=2, kernel_size=3, norm="channel", eps=1e-6, affine=True)
    nn.init.normal_(module.norm_weight)
    nn.init.normal_(module.norm_bias)
    x = torch.randn(3, 5, 7, 6)
    h = F.conv2d(x, module.weight, module.bias, padding=1, groups=5).permute(0, 2, 3, 1)
    expected = F.layer_norm(h, (10,), module.norm_weight, module.norm_bias, 1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_pointwise_conv_gelu_is_convolution_then_gelu(approximate):
    module = fastconv.PointwiseConvGELU(5, 3, bias=False, approximate=approximate)
    x = torch.randn(3, 5, 7, 6)
    torch.testing.assert_close(module(x), F.gelu(F.conv2d(x, module.weight), approximate=approximate))


def test_with_the_sample_norm_logits_do_not_depend_on_the_batch():
    model = fastconv.Classifier(width=8, depth=1, norm="sample")
    x = torch.rand(9, 3, 32, 32)
    torch.testing.assert_close(model(x)[3:4], model(x[3:4]), rtol=1e-4, atol=1e-5)
    # The lecture's norm spans the batch.
    lecture = fastconv.Classifier(width=8, depth=1)
    assert (lecture(x)[3:4] - lecture(x[3:4])).abs().max() > 1e-3


def test_train_and_eval_agree():
    model = fastconv.Classifier(width=8, depth=1)
    x = torch.rand(4, 3, 32, 32)
    expected = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected.detach())


def test_copies_and_pickles():
    module = fastconv.ConvNextBlock(3, norm="sample", affine=True)
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


def test_autocast_trains():
    model = fastconv.Classifier(width=8, depth=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.rand(16, 3, 32, 32))
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    exact = model.double()(torch.zeros(1, 3, 32, 32).double())
    assert exact.dtype == torch.float64


def test_compile_without_graph_breaks(backend):
    model = fastconv.Classifier(width=8, depth=1)
    x = torch.rand(16, 3, 32, 32)
    expected = [model(x), *torch.autograd.grad(model(x).square().sum(), list(model.parameters()))]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = [compiled(x), *torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_blocks_are_fused(monkeypatch):
    """Which the numbers cannot show: a part that the compiler takes for a changed one is called."""
    fused, block = [], functional.convnext_block
    monkeypatch.setattr(functional, "convnext_block", lambda *args, **kw: fused.append(1) or block(*args, **kw))
    torch.compiler.reset()
    torch.compile(fastconv.ConvNextBlock(8), fullgraph=True, backend="eager")(torch.rand(4, 8, 6, 6))
    assert fused == [1]


@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_compiled_for_maps_of_any_size(backend):
    torch.compiler.reset()
    model = fastconv.Classifier(4, 1, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with fastconv.backend(backend):
        # The last are large maps.
        for shape in ((4, 3, 8, 8), (6, 3, 12, 10), (2, 3, 40, 40)):
            x = torch.rand(shape)
            torch.testing.assert_close(compiled(x), model(x))


def test_representations_tell_the_options():
    assert "norm=channel, eps=1e-06, affine=True" in repr(
        fastconv.DepthwiseConvLayerNorm(3, norm="channel", eps=1e-6, affine=True)
    )
    assert "approximate=tanh" in repr(fastconv.PointwiseConvGELU(3, 4, approximate="tanh"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastconv.DepthwiseConvLayerNorm(0), "in_channels is 0; expected at least 1"),
        (lambda: fastconv.DepthwiseConvLayerNorm(3, multiplier=0), "multiplier is 0; expected at least 1"),
        (
            lambda: fastconv.DepthwiseConvLayerNorm(3, kernel_size=4),
            "kernel_size is 4; expected an odd number",
        ),
        (lambda: fastconv.ConvNextBlock(3, norm="batch"), "norm is 'batch'; expected one of tensor, sample"),
        (lambda: fastconv.PointwiseConvGELU(3, 3, approximate="erf"), "'erf'; expected one of none, tanh"),
        (lambda: fastconv.Classifier(depth=0), "depth is 0; expected at least 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_images_too_small_for_the_patches():
    with pytest.raises(ValueError, match=r"x is 1 x 1 pixels; expected at least one patch of 2 x 2"):
        fastconv.Classifier(width=4, depth=1)(torch.rand(2, 3, 4, 4))


class LowRank(nn.Module):
    """Adapts a convolution as LoRA does: by the product of two of its class, which train in its place."""

    def __init__(self, conv):
        super().__init__()
        self.base_layer = conv.requires_grad_(False)
        self.down = type(conv)(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.up = type(conv)(2, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Weights(torch.Tensor):
    """Parameters as in quantized layers: a type of their own."""


def setting(part, name, value):
    return lambda model: setattr(model.get_submodule(part), name, value)


def replacing(part, make):
    def change(model):
        parent, _, name = part.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(part)))

    return change


def patch_convolution(conv):
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, 2 * weight, bias)
    return conv


def patch_forward(conv):
    conv.forward = functools.partial(F.conv2d, weight=torch.ones_like(conv.weight))
    return conv


def pad_in_a_circle(conv):
    return nn.Conv2d(conv.in_channels, conv.out_channels, 7, 1, 3, groups=8, padding_mode="circular")


def change_type(conv):
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Weights))
    return conv


def hooked(conv):
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    return conv


BLOCK = "conv_block_1.0"


# What people do to the parts of a model.
def setting_data(name, *shape):
    """Another weight, where all else says that it has the old one's shape."""

    def change(model):
        model.get_submodule(name).weight.data = torch.randn(shape) / 10

    return change


CHANGES = {
    "stem 3x3": replacing("stem", lambda conv: nn.Conv2d(3, 8, 3, padding=1)),
    "stem's stride": setting("stem", "stride", (2, 2)),
    "stem with a weight of 8x8": setting_data("stem", 8, 3, 8, 8),
    "stem with a weight of 2x2": setting_data("stem", 8, 3, 2, 2),
    "downsample with a weight of 1x1": setting_data("downsample", 16, 8, 1, 1),
    "block with taps of 3x3": setting_data("conv_block_1.0.conv1", 32, 1, 3, 3),
    "stem hooked": replacing("stem", hooked),
    "stem pruned": lambda model: prune.l1_unstructured(model.stem, "weight", 0.5),
    "downsample 3x3": replacing("downsample", lambda conv: nn.Conv2d(8, 16, 3, 2, 1)),
    "no bottleneck": replacing("bottleneck", lambda conv: nn.Identity()),
    "dropout before the bottleneck": replacing("bottleneck", lambda conv: nn.Sequential(nn.Dropout(0.0), conv)),
    "more classes": replacing("bottleneck", lambda conv: nn.Conv2d(16, 100, 1)),
    "dilation": setting(f"{BLOCK}.conv1", "dilation", (2, 2)),
    "padding mode": replacing(f"{BLOCK}.conv1", pad_in_a_circle),
    "even kernel": replacing(f"{BLOCK}.conv1", lambda conv: nn.Conv2d(8, 32, 6, padding="same", groups=8)),
    "groups": replacing(f"{BLOCK}.conv3", lambda conv: nn.Conv2d(8, 8, 1, groups=2)),
    "weight norm": lambda model: parametrizations.weight_norm(model.get_submodule(f"{BLOCK}.conv2")),
    "old weight norm": lambda model: nn.utils.weight_norm(model.get_submodule(f"{BLOCK}.conv2")),
    "old spectral norm": lambda model: nn.utils.spectral_norm(model.get_submodule(f"{BLOCK}.conv3")),
    "pruned": lambda model: prune.l1_unstructured(model.get_submodule(f"{BLOCK}.conv2"), "weight", 0.5),
    "adapter": replacing(f"{BLOCK}.conv2", LowRank),
    "hook": replacing(f"{BLOCK}.conv1", hooked),
    "patched forward": replacing(f"{BLOCK}.conv3", patch_forward),
    "patched convolution": replacing(f"{BLOCK}.conv2", patch_convolution),
    "weights of another type": replacing(f"{BLOCK}.conv2", change_type),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_part_that_was_changed_is_called(name):
    lecture, ours = reference.Classifier(8, 1), fastconv.Classifier(8, 1)
    ours.load_state_dict(lecture.state_dict())
    for model in (lecture, ours):
        torch.manual_seed(1)
        CHANGES[name](model)
    x, labels = torch.rand(4, 3, 32, 32), torch.randint(10, (4,))
    mine, expected = ours(x), lecture(x)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    for y in mine, expected:
        F.cross_entropy(y, labels).backward()
    trained = dict(ours.named_parameters())
    for name, parameter in lecture.named_parameters():
        torch.testing.assert_close(trained[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["each module's", "of all modules"])
def test_hooks_see_what_the_lectures_do(whole):
    def seen(model, x):
        found, names = {}, {module: name for name, module in model.named_modules()}

        def keep(module, _, output):
            found[names[module]] = output.detach()

        if whole:
            for module in model.modules():
                module.register_forward_hook(keep)
            model(x)
        else:
            with nn.modules.module.register_module_forward_hook(keep):
                model(x)
        return found

    lecture, ours = reference.Classifier(8, 1), fastconv.Classifier(8, 1)
    ours.load_state_dict(lecture.state_dict())
    x = torch.rand(4, 3, 32, 32)
    mine, expected = seen(ours, x), seen(lecture, x)
    assert list(mine) == list(expected)
    for name, output in expected.items():
        torch.testing.assert_close(mine[name], output, rtol=1e-4, atol=1e-5)


def test_unchanged_parts_are_computed_at_once(monkeypatch):
    model = fastconv.Classifier(8, 1)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", None)
    assert model(torch.rand(4, 3, 32, 32)).shape == (4, 10)


def test_state_dicts_from_when_the_norm_belonged_to_a_part_are_loaded():
    block = fastconv.ConvNextBlock(4, affine=True)
    state = {
        (f"0.conv1.{name}" if name.startswith("norm") else f"0.{name}"): torch.rand_like(value)
        for name, value in block.state_dict().items()
    }
    nn.Sequential(block).load_state_dict(state)
    assert torch.equal(block.norm_weight, state["0.conv1.norm_weight"])
    assert torch.equal(block.norm_bias, state["0.conv1.norm_bias"])


def test_separate_modules_follow_their_settings():
    x = torch.randn(3, 4, 9, 8)
    depthwise = fastconv.DepthwiseConvLayerNorm(4, multiplier=2, kernel_size=3)
    depthwise.stride, depthwise.padding = (2, 2), (1, 1)
    h = F.conv2d(x, depthwise.weight, depthwise.bias, 2, 1, groups=4)
    torch.testing.assert_close(depthwise(x), F.layer_norm(h, h.shape), rtol=1e-4, atol=1e-5)
    pointwise = fastconv.PointwiseConvGELU(4, 3)
    pointwise.stride = (2, 2)
    torch.testing.assert_close(pointwise(x), F.gelu(F.conv2d(x, pointwise.weight, pointwise.bias, 2)))


def test_an_adapter_of_a_module_that_is_no_linear_map_is_an_error():
    with pytest.raises(TypeError, match=r"PointwiseConvGELU got \(\(1, 1\), .*no linear map: .* use nn\.Conv2d"):
        LowRank(fastconv.PointwiseConvGELU(8, 4))


def test_counters_of_multiplications_see_the_lectures():
    torchinfo = pytest.importorskip("torchinfo")
    counted = []
    for model in reference.Classifier(8, 1), fastconv.Classifier(8, 1):
        summary = torchinfo.summary(model, (2, 3, 32, 32), verbose=0)
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(2, 3, 32, 32)).sum().backward()
        counted.append((summary.total_mult_adds, counter.get_total_flops()))
    assert counted[0] == counted[1]
    assert counted[0][0] > 1e5


@pytest.mark.parametrize("side", [6, 16])
def test_flops_of_the_operations_are_counted(side):
    """Pairs of a multiplication and an addition; on small maps the portable convolution is a Toeplitz product."""
    block, images, pixels = fastconv.ConvNextBlock(4), 64, side**2
    arguments = [value for part in block.children() for value in (part.weight, part.bias)]
    with FlopCounterMode(display=False) as counter:
        functional.convnext_block(torch.rand(images, 4, side, side), *arguments)
    toeplitz = side == 6 and backends.current() == "portable"
    taps = pixels if toeplitz else 49
    assert counter.get_total_flops() == 2 * images * pixels * (16 * taps + 16 * 4 + 4 * 4)


def test_a_forward_that_is_patched_after_compiling_is_called(backend):
    block, x = fastconv.ConvNextBlock(8), torch.rand(4, 8, 6, 6)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    compiled(x)
    convolve = functools.partial(nn.Conv2d.forward, block.conv2)
    block.conv2.forward = lambda maps: 3 * convolve(maps)
    torch.testing.assert_close(compiled(x), block(x))


def test_maps_of_other_channels_are_refused():
    for multiplier, channels in ((4, 16), (1, 4)):
        with pytest.raises(RuntimeError, match=f"to have 8 channels, but got {channels}"):
            fastconv.DepthwiseConvLayerNorm(8, multiplier)(torch.rand(2, channels, 5, 5))


FORMATS = [torch.contiguous_format, torch.channels_last]
PARTS = ("stem", "conv_block_1", "conv_block_1.0", "downsample", "conv_block_2.0", "bottleneck")


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_who_sees_the_maps_of_a_classifier_sees_the_lectures_strides(format, weights):
    lecture = reference.Classifier(width=8, depth=1).to(memory_format=weights)
    ours = fastconv.Classifier(width=8, depth=1).to(memory_format=weights)
    x = torch.rand(16, 3, 32, 32).contiguous(memory_format=format).requires_grad_()
    seen = {lecture: [], ours: []}
    for model, strides in seen.items():
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, strides=strides: strides.append((inputs[0].stride(), output.stride()))
            )
            for name in PARTS
        ]
        logits = model(x)
        strides += [logits.stride(), torch.autograd.grad(logits.square().sum(), x)[0].stride()]
        for hook in hooks:
            hook.remove()
        # Without hooks as well.
        logits = model(x)
        strides += [logits.stride(), torch.autograd.grad(logits.square().sum(), x)[0].stride()]
        strides += [model(x.detach()).stride()]
    assert seen[lecture] == seen[ours]


@pytest.mark.parametrize("backend", ["portable", "native"], indirect=True)
def test_hooks_may_view_the_maps_between_the_parts_of_a_classifier(backend):
    model = fastconv.Classifier(width=8, depth=1)
    x = torch.rand(16, 3, 32, 32)
    expected = model(x)

    def view(_, inputs, output):
        inputs[0].view(16, -1), output.view(16, -1)

    for name in PARTS:
        model.get_submodule(name).register_forward_hook(view)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("backend", ["portable", "native"], indirect=True)
@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_distributed_data_parallel_takes_gradients_without_a_warning(weights, backend, tmp_path, recwarn):
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    always = torch.is_warn_always_enabled()
    # PyTorch warns of strides once in a process.
    torch.set_warn_always(True)
    try:
        for model in (fastconv.Classifier(8, 1), fastconv.Classifier(8, 1, norm="channel")):
            parallel = nn.parallel.DistributedDataParallel(model.to(memory_format=weights))
            for images in (64, 2):
                parallel(torch.rand(images, 3, 32, 32)).square().sum().backward()
    finally:
        torch.set_warn_always(always)
        torch.distributed.destroy_process_group()
    assert [str(warning.message) for warning in recwarn if "stride" in str(warning.message)] == []


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_compiled_results_have_the_lectures_strides(format):
    x = torch.rand(16, 8, 8, 8).contiguous(memory_format=format)
    lecture, ours = reference.ConvNextBlock(8), fastconv.ConvNextBlock(8)
    # Of one forward only so many graphs are made.
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert compiled(x).stride() == lecture(x).stride()


@pytest.mark.parametrize(
    ("ours", "plain", "size"),
    [
        (lambda: fastconv.ConvNextBlock(4), lambda: reference.ConvNextBlock(4), (4, 5, 6)),
        (
            lambda: fastconv.DepthwiseConvLayerNorm(4),
            lambda: nn.Sequential(
                nn.Conv2d(4, 16, 7, padding="same", groups=4),
                nn.LayerNorm((16, 5, 6), elementwise_affine=False),
            ),
            (4, 5, 6),
        ),
        (
            lambda: fastconv.PointwiseConvGELU(4, 3),
            lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.GELU()),
            (4, 5, 6),
        ),
        (lambda: fastconv.Classifier(4, 1), lambda: reference.Classifier(4, 1), (3, 16, 16)),
    ],
    ids=["block", "depthwise", "pointwise", "classifier"],
)
def test_an_image_without_a_batch(ours, plain, size):
    """As PyTorch's convolutions take it."""
    ours, plain, x = ours(), plain(), torch.rand(size)
    ours.load_state_dict({name.removeprefix("0."): value for name, value in plain.state_dict().items()})
    torch.testing.assert_close(ours(x), plain(x))
