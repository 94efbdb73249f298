"""`GraphedStep`: on a CPU with a stand-in for the capture, on a GPU with CUDA graphs."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.graphs import CaptureError, GraphedStep, step

CUDA = "cuda"


@pytest.fixture
def rehearsed(monkeypatch):
    """A CPU in the place of a GPU, and a function in the place of its graph."""

    def capture(function, device):
        for _ in range(3):
            function()
        return function

    monkeypatch.setattr(step, "GRAPHABLE", "cpu")
    monkeypatch.setattr(step, "capture", capture)


class Net(nn.Module):
    """Batch norm has buffers that a step changes, and dropout draws random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.4), nn.Flatten(), nn.Linear(54, 4)
        )

    def forward(self, x):
        return self.layers(x)


def batches(count, images=7, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x, labels = torch.randn(images, 3, 5, 5, generator=generator), torch.randint(4, (images,), generator=generator)
        yield x.to(device), labels.to(device)


def adamw(parameters, **settings):
    """Fused, it also runs on a CPU with `capturable`."""
    return torch.optim.AdamW(parameters, lr=0.03, fused=True, capturable=True, **settings)


def make(optimizer=adamw, model=None, loss=F.cross_entropy, images=7):
    """A model, its optimizer and its graphed step."""
    model = Net() if model is None else model
    optimizer = optimizer(model.parameters())
    return model, optimizer, GraphedStep(model, loss, optimizer, next(batches(1, images)))


def eager(model, optimizer, x, labels, autocast=False):
    optimizer.zero_grad()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def tensors(model, optimizer):
    """All that training changes, with names."""
    found = dict(model.state_dict())
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{i}.{name}": x for name, x in state.items() if isinstance(x, torch.Tensor)}
    return {name: x.clone() for name, x in found.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def assert_steps_equal(optimizer, model, first=0, autocast=False, device="cpu", steps=4):
    """Losses, weights, buffers and state after each step are those of eager steps, bit for bit.

    Args:
        first: eager steps before the graph is made.
    """
    model = model.to(device)
    other = copy.deepcopy(model)
    optimizer, others = optimizer(model.parameters()), optimizer(other.parameters())
    data = [*batches(first + steps, device=device)]
    for batch in data[:first]:
        for each, its_optimizer in ((model, optimizer), (other, others)):
            torch.manual_seed(2)
            eager(each, its_optimizer, *batch)
    torch.manual_seed(3)
    expected = []
    for batch in data[first:]:
        loss = eager(other, others, *batch, autocast)
        expected.append({"loss": loss, **tensors(other, others)})
    torch.manual_seed(3)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        graphed = GraphedStep(model, F.cross_entropy, optimizer, data[-1])
    for batch, after in zip(data[first:], expected, strict=True):
        loss = graphed(*batch)
        assert_equal({"loss": loss, **tensors(model, optimizer)}, after)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def capturable(name, **settings):
    return lambda parameters: getattr(torch.optim, name)(parameters, capturable=True, **settings)


OPTIMIZERS = {
    "AdamW": adamw,
    "Adam": lambda parameters: torch.optim.Adam(parameters, fused=True, capturable=True, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adadelta": capturable("Adadelta"),
    "Adamax": capturable("Adamax"),
    "NAdam": capturable("NAdam"),
    "RAdam": capturable("RAdam"),
    "RMSprop": capturable("RMSprop", momentum=0.9, centered=True),
}


@pytest.fixture
def capturable_on_a_cpu(monkeypatch):
    for name in ("adadelta", "adamax", "nadam", "radam", "rmsprop", "rprop"):
        module = sys.modules[f"torch.optim.{name}"]
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])


@pytest.mark.parametrize("first", [0, 1], ids=["new", "after an eager step"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_equal_eager_ones(rehearsed, capturable_on_a_cpu, optimizer, first):
    assert_steps_equal(OPTIMIZERS[optimizer], Net(), first)


@pytest.mark.parametrize("module", [fastconv.Classifier, fastconv.reference.Classifier])
def test_classifiers(rehearsed, module):
    assert_steps_equal(adamw, module(width=4, depth=1, patch=1, num_classes=4), steps=2)


def test_ambient_autocast_is_that_of_the_construction(rehearsed):
    assert_steps_equal(adamw, Net(), autocast=True)
