"""The lecture's classifier: its size layer by layer, and its values against one in NumPy float64."""

import math

import numpy as np
import pytest
import torch
from torchinfo import summary

from fastconv.operations import reference


def test_parameters_of_each_layer():
    model = reference.Classifier()
    layers = {
        info.var_name if info.depth == 1 else f"{info.parent_info.var_name}.{info.var_name}": info.num_params
        for info in summary(model, (128, 3, 32, 32), verbose=0, depth=4).summary_list
        if info.depth > 0
    }
    block_1, block_2 = layers["conv_block_1.0"], layers["conv_block_2.0"]
    assert layers["stem"] == 3 * 4 * 4 * 32 + 32 == 1_568
    assert block_1 == (128 * 49 + 128) + (128 * 32 + 32) + (32 * 32 + 32) == 11_584
    assert layers["conv_block_1"] == 5 * block_1 == 57_920
    assert layers["downsample"] == 32 * 2 * 2 * 64 + 64 == 8_256
    assert block_2 == (256 * 49 + 256) + (256 * 64 + 64) + (64 * 64 + 64) == 33_408
    assert layers["conv_block_2"] == 5 * block_2 == 167_040
    assert layers["bottleneck"] == 64 * 10 + 10 == 650
    assert summary(model, (128, 3, 32, 32), verbose=0).total_params == 235_434


def test_the_knobs_change_what_they_name():
    model = reference.Classifier(width=6, depth=2, patch=2, in_channels=1, num_classes=4)
    assert model.stem.weight.shape == (6, 1, 2, 2)
    assert len(model.conv_block_1) == len(model.conv_block_2) == 2
    assert model.conv_block_2[1].conv1.weight.shape == (48, 1, 7, 7)
    assert model(torch.rand(3, 1, 12, 12)).shape == (3, 4)


def numpy_layer_norm(x):
    return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)


def numpy_conv(x, weight, bias, stride=1, padding=0, groups=1):
    """Convolution by its definition, one output pixel at a time."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    outputs, inputs, kernel_height, kernel_width = weight.shape
    height = (x.shape[2] - kernel_height) // stride + 1
    width = (x.shape[3] - kernel_width) // stride + 1
    y = np.empty((len(x), outputs, height, width))
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        for i in range(height):
            for j in range(width):
                window = x[
                    :,
                    first : first + inputs,
                    i * stride : i * stride + kernel_height,
                    j * stride : j * stride + kernel_width,
                ]
                y[:, o, i, j] = (window * weight[o]).sum((1, 2, 3)) + bias[o]
    return y


def numpy_classifier(state, x, depth):
    def conv(x, name, **options):
        return numpy_conv(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def blocks(x, name):
        for i in range(depth):
            y = conv(x, f"{name}.{i}.conv1", padding=3, groups=x.shape[1])
            y = conv(numpy_layer_norm(y), f"{name}.{i}.conv2")
            y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
            x = conv(y, f"{name}.{i}.conv3") + x
        return x

    x = numpy_layer_norm(conv(x, "stem", stride=state["stem.weight"].shape[2]))
    x = numpy_layer_norm(blocks(x, "conv_block_1"))
    x = blocks(conv(x, "downsample", stride=2), "conv_block_2")
    return conv(x, "bottleneck").mean((2, 3))


@pytest.fixture
def small():
    """A small classifier in float64, its state as NumPy arrays, and images."""
    model = reference.Classifier(width=3, depth=2, patch=2, num_classes=4).double()
    state = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    return model, state, torch.rand(3, 3, 12, 12).double()


def test_forward_is_that_of_numpy(small):
    model, state, x = small
    np.testing.assert_allclose(model(x).detach().numpy(), numpy_classifier(state, x.numpy(), 2), rtol=1e-10)


def test_each_gradient_is_numpys_difference_quotient(small):
    model, state, x = small
    rng = np.random.default_rng(0)
    direction = rng.standard_normal((3, 4))
    grads = torch.autograd.grad((model(x) * torch.from_numpy(direction)).sum(), list(model.parameters()))
    step = 1e-5
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        change = rng.standard_normal(state[name].shape)
        values = [
            (numpy_classifier({**state, name: state[name] + sign * step * change}, x.numpy(), 2) * direction).sum()
            for sign in (1, -1)
        ]
        quotient = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose((grad.numpy() * change).sum(), quotient, rtol=1e-6, atol=1e-8, err_msg=name)
