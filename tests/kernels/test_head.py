"""The head's kernel against float64: its losses, correct answers and gradients."""

import itertools
import math

import pytest
import torch
from oracle import assert_accurate
from torch.nn import functional as F

pytest.importorskip("triton")
from fastconv.kernels.common.rules import accumulator
from fastconv.kernels.head import tiling as head_tiling
from fastconv.kernels.head.tiling import HeadTiling

# images, channels, height, width, classes
SHAPES = {
    "lecture": (3, 64, 4, 4, 10),
    "odd": (2, 7, 3, 5, 3),
    "one of each": (1, 1, 1, 1, 1),
    "one class": (2, 5, 2, 3, 1),
    "two blocks of pixels": (2, 3, 9, 8, 17),
}
POSITION = 2

pytestmark = pytest.mark.usefixtures("device", "poisoned")


def draw(images, channels, height, width, classes, dtype=torch.float32):
    """Maps, weight and bias, each in `dtype`; labels of images, and an order that repeats and permutes them."""
    maps = torch.randn(images, channels, height, width), torch.randn(classes, channels), torch.randn(classes)
    labels, order = torch.randint(classes, (5,)), torch.randint(5, (POSITION + images + 3,))
    return [x.to(dtype) for x in maps], labels, order


def head(parameters, labels, order, device, gradients=True):
    """The sum of losses, the number of correct answers, and gradients of maps, weight and bias."""
    x, weight, bias = (tensor.to(device) for tensor in parameters)
    tiling = HeadTiling(x, bias.shape[0])
    outcome = tiling.new_outcome(x)
    where = labels.to(device), order.to(device), torch.tensor([POSITION], device=device)
    if not gradients:
        tiling.evaluate()(x, weight, bias, *where, *outcome, None, None)
        return outcome
    partials = x.new_empty(tiling.programs, tiling.length, dtype=accumulator(x))
    grad_x = torch.empty_like(x)
    tiling.forward_backward()(x, weight, bias, *where, *outcome, grad_x, partials)
    grad_weight, grad_bias = partials.sum(0).split([weight.numel(), bias.numel()])
    return *(result.sum() for result in outcome), grad_x, grad_weight.view_as(weight), grad_bias


def definition(parameters, labels, order):
    """The same by PyTorch, in the dtype of the parameters."""
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in parameters)
    logits = F.avg_pool2d(F.conv2d(x, weight[:, :, None, None], bias), x.shape[2:]).flatten(1)
    target = labels[order[POSITION : POSITION + x.shape[0]]]
    loss = F.cross_entropy(logits, target)
    loss.backward()
    return loss.detach() * x.shape[0], (logits.argmax(1) == target).sum(), x.grad, weight.grad, bias.grad


def assert_head_accurate(device, *shape, dtype=torch.float32, samples=2):
    def sample():
        parameters, labels, order = draw(*shape, dtype)
        ours = [result.cpu() for result in head(parameters, labels, order, device)]
        other = definition(parameters, labels, order)
        exact = definition([x.double() for x in parameters], labels, order)
        assert ours[1] == exact[1]
        # In half types all but the gradient of the maps is wider than PyTorch's.
        results = zip(["loss", "correct", "x", "weight", "bias"], ours, other, exact, strict=True)
        return {name: (a, b.to(a.dtype), c) for name, a, b, c in results}

    assert_accurate(sample, dtype, samples)


@pytest.mark.parametrize("name", SHAPES)
def test_losses_and_gradients(name, device):
    assert_head_accurate(device, *SHAPES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    assert_head_accurate(device, *SHAPES["odd"], dtype=dtype, samples=8)


def test_blocks_of_channels_and_several_images_to_a_program(device, monkeypatch):
    monkeypatch.setattr(head_tiling, "TILE", 32)
    monkeypatch.setattr(head_tiling, "MAX_PARTIALS", 2)
    assert HeadTiling(torch.empty(5, 7, 3, 2), 9).programs == 2
    assert_head_accurate(device, 5, 7, 3, 2, 9)


def test_an_evaluation_has_the_same_losses_and_correct_answers(device):
    drawn = draw(*SHAPES["odd"])
    losses, correct = head(*drawn, device, gradients=False)
    expected = head(*drawn, device)
    torch.testing.assert_close(losses.sum(), expected[0], rtol=1e-6, atol=0)
    assert torch.equal(correct.sum(), expected[1])


# Logits of four classes, made by the bias alone.
LOGITS = {
    "large": [3e4, -3e4, 2.9e4, 0.0],
    "larger than exp allows": [1e30, 1e30, -1e30, 0.0],
    "equal ones": [1.0, 2.0, 2.0, 0.0],
    "minus infinity": [0.0, -math.inf, 2.0, 1.0],
    "infinity": [0.0, math.inf, 2.0, math.inf],
    "NaN": [math.inf, math.nan, 2.0, math.nan],
    "all minus infinity": [-math.inf] * 4,
}


@pytest.mark.parametrize("label", range(4))
@pytest.mark.parametrize("name", LOGITS)
def test_extreme_logits_are_as_in_pytorch(name, label, device):
    parameters = [torch.zeros(1, 1, 1, 1), torch.zeros(4, 1), torch.tensor(LOGITS[name])]
    batch = [x.double() for x in parameters], torch.tensor([label]), torch.zeros(4, dtype=torch.int64)
    for ours, exact in zip(head(*batch, device), definition(*batch), strict=True):
        torch.testing.assert_close(ours.cpu(), exact, equal_nan=True, check_dtype=False)


def test_a_nan_or_an_infinity_of_one_image(device):
    for value in (math.nan, math.inf, -math.inf):
        parameters, labels, order = draw(3, 2, 2, 3, 4, torch.float64)
        parameters[0][1, 0, 1, 2] = value
        results = zip(head(parameters, labels, order, device), definition(parameters, labels, order), strict=True)
        for ours, exact in results:
            torch.testing.assert_close(ours.cpu(), exact, equal_nan=True, check_dtype=False)


def test_results_repeat_bit_for_bit(device):
    drawn = draw(*SHAPES["odd"])
    first, second = (head(*drawn, device) for _ in range(2))
    assert all(itertools.starmap(torch.equal, zip(first, second, strict=True)))
