"""The rule for right results: their error against float64 is at most twice PyTorch's own in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# An error below the floor is right: long sums of weight gradients differ by the order of their terms.
FLOOR = {torch.float32: 5e-6, torch.float16: 1.25e-4, torch.bfloat16: 1e-3}
# tf32 cuts operands to 10 bits, 2^-11 too small on average. The longest chain of a block's gradients has three
# products of two operands each.
TF32_FLOOR = 6 * 2**-11
# A gradient of a few numbers is rounded well or badly by chance: errors are averaged over this many samples.
SAMPLES = 8
# An error of up to NEAR bounds may be chance, as in one of some hundreds of cases. Then NEAR_SAMPLES times as many
# samples decide.
NEAR, NEAR_SAMPLES = 2.0, 8
FORMATS = ("contiguous", "channels_last", "batch_last", "sliced")


class Error(NamedTuple):
    """Norms of the difference from the exact result, over the norm of the exact result."""

    ours: float
    pytorch: float
    floor: float

    @property
    def bound(self) -> float:
        """The largest error that is right: twice PyTorch's, or the floor; only the floor if PyTorch overflows."""
        return max(self.floor, 2 * self.pytorch) if math.isfinite(self.pytorch) else self.floor

    @property
    def right(self) -> bool:
        # False if ours is NaN.
        return self.ours <= self.bound

    @property
    def excess(self) -> float:
        """The error in units of the bound, for sorting; infinite if it is NaN."""
        return math.inf if math.isnan(self.ours) else self.ours / self.bound

    def __str__(self) -> str:
        return f"error {self.ours:.1e}, PyTorch's {self.pytorch:.1e}; at most {self.bound:.1e} is right"


def measure(
    sample: Callable[[], Mapping[str, tuple[Tensor, Tensor, Tensor]]], floor: float, samples: int = SAMPLES
) -> dict[str, Error]:
    """The errors of each tensor that `sample()` draws, as {name: (ours, PyTorch's, exact)}, pooled over samples.

    Raises:
        ValueError: one of ours has another shape or dtype than PyTorch's.
    """
    squares: dict[str, list[float]] = {}
    for _ in range(samples):
        for name, (mine, other, exact) in sample().items():
            if mine.shape != exact.shape or mine.dtype != other.dtype:
                raise ValueError(
                    f"{name} is {mine.dtype} {tuple(mine.shape)}; expected {other.dtype} {tuple(exact.shape)}"
                )
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for i, difference in enumerate((mine - exact, other - exact, exact)):
                sums[i] += difference.double().square().sum().item()
    return {
        name: Error(relative(mine, scale), relative(other, scale), floor)
        for name, (mine, other, scale) in squares.items()
    }


def judge(
    sample: Callable[[], Mapping[str, tuple[Tensor, Tensor, Tensor]]], floor: float, samples: int = SAMPLES
) -> dict[str, Error]:
    """As `measure`, but on more samples if the worst error is so near its bound that it may be chance."""
    errors = measure(sample, floor, samples)
    _, error = worst(errors)
    return measure(sample, floor, NEAR_SAMPLES * samples) if 1 < error.excess < NEAR else errors


def worst(errors: Mapping[str, Error]) -> tuple[str, Error]:
    """The tensor whose error is closest to its bound, or farthest beyond."""
    return max(errors.items(), key=lambda item: item[1].excess)


def relative(difference: float, scale: float) -> float:
    """The root of the ratio of two sums of squares; any difference from zero is infinite."""
    return math.sqrt(difference / scale) if scale else (math.inf if difference else 0.0)


def compare(
    ours: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    names: Sequence[str],
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Compute the output and each gradient three times: by ours, by PyTorch in the same dtype, and exactly.

    Args:
        ours, definition: the function to judge, and its definition; both are called with the inputs.
        inputs: the maps (N, C, H, W), then parameters, some of them None. All are rounded to `dtype` first.
        names: the names of the inputs.
        layout: one of FORMATS, for our maps, and for the gradient of our output if it is maps.
        autocast: run ours and PyTorch's under torch.autocast in bfloat16.
        device: where ours and PyTorch's run; the exact ones are float64 on the CPU.

    Returns:
        {name: (ours, PyTorch's, exact)}, all on the CPU.
    """
    inputs = as_dtype(as_dtype(inputs, dtype), torch.float64)
    grad = torch.randn(definition(*inputs).shape).to(dtype).double()
    exact = outputs_and_grads(definition, inputs, grad)
    low = [None if x is None else x.to(device) for x in as_dtype(inputs, dtype)]
    maps, grad = low[0], grad.to(device)
    assert maps is not None
    grad_layout = layout if grad.dim() == 4 else "contiguous"
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=autocast):
        mine = outputs_and_grads(ours, [in_format(maps, layout), *low[1:]], in_format(grad, grad_layout))
        other = outputs_and_grads(definition, low, grad)
    names = ["output", *(name for name, x in zip(names, inputs, strict=True) if x is not None)]
    return {name: (a.cpu(), b.cpu(), c) for name, a, b, c in zip(names, mine, other, exact, strict=True)}


def outputs_and_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> list[Tensor]:
    """The value of `function` at the tensors `inputs`, then its gradient for each that is not None."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    present = [x for x in leaves if x is not None]
    return [output.detach(), *torch.autograd.grad(output, present, grad.to(output.dtype))]


def as_dtype(inputs: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype) for x in inputs]


def in_format(x: Tensor, name: str) -> Tensor:
    """Maps with the strides of one of FORMATS."""
    if name == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if name == "batch_last":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if name == "sliced":
        images, channels, height, width = x.shape
        holder = x.new_full((images, channels + 1, 2 * height, width + 3), torch.nan)
        holder[:, 1:, ::2, 2:-1] = x
        return holder[:, 1:, ::2, 2:-1]
    return x
