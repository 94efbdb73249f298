"""The assertion in which most tests of numbers end."""

import torch

from fastconv import accuracy


def assert_accurate(sample, dtype=torch.float32, samples=accuracy.SAMPLES):
    """Each of our tensors is as close to the exact one as PyTorch's, within a factor of 2 or the floor.

    `sample()` draws inputs and returns {name: (ours, PyTorch's, exact)}.
    """
    for name, error in accuracy.measure(sample, accuracy.FLOOR[dtype], samples).items():
        assert error.right, f"{name}: error {error.ours:.1e}, PyTorch's {error.pytorch:.1e}"
