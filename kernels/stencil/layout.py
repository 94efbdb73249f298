"""Maps and taps as the stencils take them: channels side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.layout import memory_format, new_maps
from ..common.rules import accumulator


def channels_side_by_side(x: Tensor) -> Tensor:
    """`x`, or a copy of it, with its channels side by side, and each image within the reach of 32 bits."""
    reach = (x.shape[2] - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3) + x.shape[1]
    if (x.stride(1) == 1 or x.shape[1] == 1) and reach < 2**31:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def taps_first(weight: Tensor) -> Tensor:
    """[K, 1, kh, kw] as [kh * kw, K], in the dtype of sums, so that no program has to convert them."""
    taps = weight.flatten(1).t()
    return torch.empty_like(taps, dtype=accumulator(weight), memory_format=torch.contiguous_format).copy_(taps)


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """`y`, whose channels lie side by side, or a copy of it, in the memory format of `x`."""
    return y if memory_format(x) == torch.channels_last else new_maps(x, y.shape[1]).copy_(y)
