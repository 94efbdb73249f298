"""The modules: drop-in for the lecture's, with the same parameters, values and gradients."""

import copy
import pickle

import pytest
import torch
from oracle import assert_accurate
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.operations import reference

CLASSIFIERS = {
    "lecture": ({}, (4, 3, 32, 32)),
    "homework": ({"width": 8, "depth": 1, "patch": 2}, (3, 3, 16, 16)),
    "other data": ({"width": 6, "depth": 2, "patch": 3, "in_channels": 1, "num_classes": 7}, (9, 1, 19, 14)),
}


@pytest.fixture(autouse=True, params=["portable", "reference"])
def backend(request):
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
