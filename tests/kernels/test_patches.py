"""The kernels of patches and their norms, against float64: interpreted on a CPU, and again on a GPU."""

import pytest
import torch
from oracle import assert_accurate
from torch.nn import functional as F

from fastconv.accuracy import compare

pytest.importorskip("triton")

from fastconv.kernels.common.layout import strides
from fastconv.kernels.layer_norm.tiling import LayerNormTiling
from fastconv.kernels.patches import tiling
from fastconv.kernels.patches.tiling import DownsampleTiling, StemTiling

EPS = 1e-5
HALVES = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("device", "poisoned")


class NormalisedStem(torch.autograd.Function):
    """The stem and its norm: of the batch of images that starts at `position` of `order`."""

    @staticmethod
    def forward(ctx, weight, bias, images, order, position, batch):
        stem = StemTiling(images, batch, weight)
        channels, _, patch, _ = weight.shape
        y = weight.new_empty(batch, channels, images.shape[2] // patch, images.shape[3] // patch)
        moments, normalised = stem.new_moments(y), torch.empty_like(y)
        stem.forward()(images, order, position, weight, bias, y, moments)
        norm = LayerNormTiling(y, "tensor")
        norm.normalise(strides(y), stem.parts, EPS, normalised)(y, moments, normalised)
        ctx.tilings, ctx.saved = (stem, norm), (images, order, position, y, moments, weight.shape)
        return normalised

    @staticmethod
    def backward(ctx, grad):
        stem, norm = ctx.tilings
        images, order, position, y, moments, size = ctx.saved
        sums, partials = norm.new_sums(moments), moments.new_empty(stem.partials, stem.length)
        norm.sums(grad, strides(y), stem.parts, EPS)(grad, y, moments, sums)
        stem.backward(stem.parts, norm.parts, EPS)(images, order, position, grad, y, moments, sums, partials)
        return *gradients(partials, size, grad.dtype), None, None, None, None


class NormalisedDownsample(torch.autograd.Function):
    """The norm, and the downsampling of what it normalised."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        norm, downsample = LayerNormTiling(x, "tensor"), DownsampleTiling(x, weight)
        patch = weight.shape[2]
        y = x.new_empty(x.shape[0], weight.shape[0], x.shape[2] // patch, x.shape[3] // patch)
        moments = norm.new_moments(x)
        norm.moments(x)(x, moments)
        downsample.forward(norm.parts, EPS)(x, moments, weight, bias, y)
        ctx.tilings, ctx.saved = (norm, downsample), (x, moments, weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        norm, downsample = ctx.tilings
        x, moments, weight = ctx.saved
        g, grad_x, sums = torch.empty_like(x), torch.empty_like(x), moments.new_empty(1, 2, downsample.partials)
        partials = moments.new_empty(downsample.partials, downsample.length)
        downsample.backward(norm.parts, EPS)(grad, x, moments, weight, g, sums, partials)
        norm.backward(g, x, norm.parts, downsample.partials, EPS, grad_x)(g, x, moments, sums, grad_x)
        return grad_x, *gradients(partials, weight.shape, grad.dtype)


def gradients(partials, size, dtype):
    """Those of weight and bias, from their partial sums."""
    weight, bias = partials.sum(0).to(dtype).split([size.numel(), size[0]])
    return weight.view(size), bias


# images in the batch, their channels, height and width, patch, outputs
STEMS = {
    "lecture": (3, 3, 16, 16, 4, 32),
    "left-over pixels": (7, 2, 11, 8, 3, 17),
    "patches of one pixel": (2, 1, 5, 7, 1, 3),
    "one patch": (5, 3, 3, 3, 2, 5),
    "many inputs": (1, 9, 9, 6, 3, 33),
}


def assert_stem_accurate(sizes, device, dtype=torch.float32, mean=0.0, samples=1):
    batch, channels, height, width, patch, outputs = sizes

    def sample():
        images = torch.randint(256, (4, channels, height, width), dtype=torch.uint8)
        # Images repeat, and others than the batch's surround it.
        order, position = torch.randint(4, (batch + 5,)), torch.tensor([3])
        data = [x.to(device) for x in (images, order, position)]

        def definition(weight, bias):
            x = images[order[3 : 3 + batch]].to(weight) / 255
            y = F.conv2d(x, weight, bias, stride=patch)
            return F.layer_norm(y, y.shape, eps=EPS)

        def ours(weight, bias):
            return NormalisedStem.apply(weight, bias, *data, batch)

        inputs = torch.randn(outputs, channels, patch, patch), mean + torch.randn(outputs)
        return compare(ours, definition, inputs, ["weight", "bias"], dtype=dtype, device=device)

    assert_accurate(sample, dtype, samples)


@pytest.mark.parametrize("name", STEMS)
def test_stem(name, device):
    assert_stem_accurate(STEMS[name], device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stem_in_half_precision(dtype, device):
    assert_stem_accurate(STEMS["left-over pixels"], device, dtype, samples=4)


def test_stem_with_a_mean_far_from_zero(device):
    assert_stem_accurate(STEMS["left-over pixels"], device, mean=1000.0)


# images, channels, height, width, patch, outputs
DOWNSAMPLES = {
    "lecture": (3, 8, 4, 4, 2, 16),
    "left-over pixels": (5, 3, 5, 7, 2, 6),
    "left-over rows": (2, 7, 8, 6, 3, 33),
    "one patch": (9, 2, 3, 2, 2, 1),
    "patches of one pixel": (2, 19, 3, 5, 1, 7),
}


def assert_downsample_accurate(sizes, device, dtype=torch.float32, mean=0.0, samples=1):
    images, channels, height, width, patch, outputs = sizes

    def definition(x, weight, bias):
        return F.conv2d(F.layer_norm(x, x.shape, eps=EPS), weight, bias, stride=patch)

    def sample():
        x = mean + torch.randn(images, channels, height, width)
        inputs = x, torch.randn(outputs, channels, patch, patch), torch.randn(outputs)
        names = ["x", "weight", "bias"]
        return compare(NormalisedDownsample.apply, definition, inputs, names, dtype=dtype, device=device)

    assert_accurate(sample, dtype, samples)


@pytest.mark.parametrize("name", DOWNSAMPLES)
def test_downsample(name, device):
    assert_downsample_accurate(DOWNSAMPLES[name], device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_downsample_in_half_precision(dtype, device):
    assert_downsample_accurate(DOWNSAMPLES["left-over pixels"], device, dtype, samples=4)


def test_downsample_with_a_mean_far_from_zero(device):
    assert_downsample_accurate(DOWNSAMPLES["left-over pixels"], device, mean=1000.0)


def test_programs_that_take_several_blocks(device, monkeypatch):
    monkeypatch.setattr(tiling, "MAX_PARTIALS", 2)
    assert_stem_accurate(STEMS["left-over pixels"], device)
    assert_downsample_accurate(DOWNSAMPLES["left-over pixels"], device)
