"""A stem that whitens the patches of the training images before the first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How many numbers to look at: 5,000 images of CIFAR-10, each of which has dozens of patches.
MOST_NUMBERS = 5_000 * 3 * 32 * 32
# Is added to the variance along each direction, in mean variances, so that noise is not blown up.
NOISE = 0.16


@torch.no_grad()
def whiten(stem: nn.Conv2d, images: Tensor) -> None:
    """Set a stem so that its outputs are uncorrelated, with a mean of zero and a variance of nearly one.

    The channels take the principal directions of the patches, those of the largest variance first. Further ones
    mix these directions as their random weights do. Neighbouring pixels are nearly alike, and a stem that has to
    find their differences by itself costs the first epochs. From Coates, Lee and Ng, "An analysis of single-layer
    networks in unsupervised feature learning", AISTATS 2011; as the start of a training, from Jordan,
    arXiv:2404.00498.

    Args:
        stem: a convolution of patches that do not overlap.
        images: uint8 [n, channels, height, width], in a random order.
    """
    some = images[: max(1, MOST_NUMBERS // images[0].numel())].cpu().float() / 255
    patches = F.unfold(some, stem.kernel_size, stride=stem.kernel_size)
    patches = patches.transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    # The least number is for images that are all alike.
    scales = (variances + NOISE * variances.mean()).clamp(min=1e-10).rsqrt()
    # As rows, with the largest variance first.
    whitening = (directions * scales).T.flip(0)
    mixed = F.normalize(stem.weight[len(whitening) :].flatten(1).double()) @ whitening
    weight = torch.cat([whitening[: stem.out_channels], mixed])
    stem.weight.copy_(weight.view_as(stem.weight))
    assert stem.bias is not None
    stem.bias.copy_(-weight @ mean)
