"""The rule by which results are judged: their error against float64, beside PyTorch's own in one dtype."""

import torch

# Long sums of weight gradients differ by the order of their terms.
FLOOR = {torch.float32: 5e-6, torch.float16: 1.25e-4, torch.bfloat16: 1e-3}
# A gradient of a few numbers is rounded well or badly by chance: errors are averaged over this many samples.
SAMPLES = 8


def assert_accurate(sample, dtype=torch.float32, samples=SAMPLES):
    """Each of our tensors is as close to the exact one as PyTorch's, within a factor of 2 or the floor.

    `sample()` draws inputs and returns {name: (ours, PyTorch's, exact)}.
    """
    squares = {}
    for _ in range(samples):
        for name, (mine, other, exact) in sample().items():
            assert mine.shape == exact.shape, name
            assert mine.dtype == other.dtype, name
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for i, difference in enumerate((mine - exact, other - exact, exact)):
                sums[i] += difference.double().square().sum().item()
    for name, sums in squares.items():
        mine, other, scale = (total**0.5 for total in sums)
        assert mine <= max(2 * other, FLOOR[dtype] * scale), (
            f"{name}: error {mine / scale:.1e}, PyTorch's {other / scale:.1e}"
        )


def outputs_and_grads(function, inputs, grad):
    """The value of `function` at the tensors `inputs`, then its gradient for each that is not None."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    present = [x for x in leaves if x is not None]
    return [output.detach(), *torch.autograd.grad(output, present, grad.to(output.dtype))]
