"""Derivatives as PyTorch's own operations compute them: those that kernels do not compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .rules import is_of_transform


def save(ctx: Any, inputs: Sequence[Any], kept: Sequence[Tensor | None]) -> None:
    """Save an autograd function's inputs, of which some are no tensors, and intermediate results."""
    ctx.save_for_backward(*[x for x in inputs if isinstance(x, Tensor)], *kept)
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """What `save` got: the inputs, and the intermediate results."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others], list(tensors)


def asks_for_more(grad: Tensor) -> bool:
    """In a backward: whether its result is to be differentiated again, or a transform computes it."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or is_of_transform(grad)


def composed_gradients(
    definition: Callable[..., Tensor], inputs: Sequence[Any], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a definition's inputs, which can be differentiated again where gradients are recorded.

    Args:
        definition: computes the result from the inputs, by PyTorch's own operations.
        inputs: tensors and others.
        needs: which of them need a gradient.
        grad: the result's gradient.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(grad):
        # One input may be computed from another: gradients end in views of them.
        views = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
        wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
        y = definition(*views).to(grad.dtype)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return tuple(next(found) if needed else None for needed in needs)


def without_autocast(x: Tensor) -> Any:
    """A backward may run where autocast is on, which would round what it multiplies."""
    kind = x.device.type
    # The meta device has none, and to ask is an error there.
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
