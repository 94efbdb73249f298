"""A plain model and one of ours that should compute the same, by name."""

import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.checking import definitions
from fastconv.operations import reference

IMAGES = 4, 3, 16, 16


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """As torchvision, timm and others write it, with the names of the lecture's parts."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, 4 * channels, 1)
        self.act = nn.GELU()
        self.conv3 = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x):
        return x + self.conv3(self.act(self.conv2(self.norm(self.conv1(x)))))


class Recorded(nn.Sequential):
    """Of definitions, whose source TorchScript cannot compile: it gets a graph, as of our modules."""

    def __prepare_scriptable__(self):
        return torch.fx.symbolic_trace(self)


def of_modules(package, kind=nn.Sequential):
    """A network of each of our modules, or of their definitions."""
    parts = {
        "stem": nn.Conv2d(3, 8, 4, stride=4),
        "block": package.ConvNextBlock(8, 4, 7, norm="sample", affine=True),
        "depthwise": package.DepthwiseConvLayerNorm(8, 2, 5, norm="channel", affine=True),
        "pointwise": package.PointwiseConvGELU(16, 10),
    }
    return kind(OrderedDict(parts))


def of_blocks():
    parts = {"stem": nn.Conv2d(3, 8, 8, stride=8), "block": ConvNeXtBlock(8), "pointwise": nn.Conv2d(8, 10, 1)}
    return nn.Sequential(OrderedDict(parts))


def fused(plain, ours):
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def swapped(plain):
    ours = copy.deepcopy(plain)
    assert fastconv.swap(ours).swapped
    return plain, ours


PAIRS = {
    "the classifier": lambda: fused(reference.Classifier(8, 1), fastconv.Classifier(8, 1)),
    "each module": lambda: fused(of_modules(definitions, Recorded), of_modules(fastconv)),
    "the lecture's, swapped": lambda: swapped(reference.Classifier(8, 1)),
    "ConvNeXt, swapped": lambda: swapped(of_blocks()),
}


def pair(name):
    """Both models, with parameters that hide nothing: neither ones nor zeros."""
    torch.manual_seed(0)
    models = PAIRS[name]()
    for model in models:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return models


def block_of(model):
    """The first block, whose parts are conv1, conv2 and conv3."""
    return next(module for module in model.modules() if hasattr(module, "conv2"))


def trained(model, x):
    """The logits, and the gradients of the images and of all parameters."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    leaves = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    gradients = torch.autograd.grad((y * weights).sum() + F.mse_loss(y, weights), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
