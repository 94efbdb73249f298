"""The memory format that PyTorch's convolutions take maps and weights for."""

import itertools

import torch
from fuzzing.arguments import LAYOUTS
from torch.nn import functional as F

from fastconv.operations import layouts

VIEWS = {
    **LAYOUTS,
    "columns of every other pixel": lambda x: x[..., ::2],
    "one channel of several": lambda x: x[:, :1],
    "one row of several": lambda x: x[:, :, :1],
    "one image of several": lambda x: x[:1],
    "one channel as several": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}


def test_the_format_of_maps_is_what_convolutions_take_them_for():
    sizes = itertools.product((1, 3), (1, 2), (1, 4), (1, 5))
    for size, format, name in itertools.product(sizes, (layouts.CONTIGUOUS, layouts.CHANNELS_LAST), VIEWS):
        x = VIEWS[name](torch.rand(size).contiguous(memory_format=format))
        y = F.conv2d(x, torch.rand(3, x.shape[1], 1, 1))
        expected = torch.empty(y.shape, memory_format=layouts.format_of(x))
        pairs = zip(y.shape, y.stride(), expected.stride(), strict=True)
        assert all(ours == own for length, own, ours in pairs if length > 1), (size, format, name)
