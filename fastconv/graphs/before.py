"""Restores a model and its optimizer after steps that only warm up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Before:
    """Parameters, buffers, the optimizer's state and groups, gradients and random states, as they were.

    Args:
        registries: the dicts in which modules keep parameters, buffers and submodules.
        parameters: all of them, those of the optimizer included.
        device: where the step runs.
    """

    def __init__(
        self,
        registries: Iterable[dict[str, Any]],
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        device: torch.device,
    ) -> None:
        self._optimizer, self._device = optimizer, device
        dicts: list[dict[Any, Any]] = [*registries, *optimizer.param_groups]
        dicts += [optimizer.state, *optimizer.state.values()]
        self._contents = [(each, dict(each)) for each in dicts]
        contained = [x for each in dicts for x in each.values() if isinstance(x, Tensor)]
        self._values = [(x, x.detach().clone()) for x in dict.fromkeys([*parameters, *contained])]
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._host_random = torch.get_rng_state()
        self._gpu_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Restore everything, also what was replaced or added."""
        for each, contents in self._contents:
            each.clear()
            each.update(contents)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self.restore_values()

    @torch.no_grad()
    def restore_values(self) -> None:
        """Restore the values of tensors, and the random states."""
        for x, value in self._values:
            # What has not changed may be an expanded view, which cannot be written.
            if not torch.equal(x, value):
                x.copy_(value)
        torch.set_rng_state(self._host_random)
        if self._gpu_random is not None:
            torch.cuda.set_rng_state(self._gpu_random, self._device)

    def new_state(self) -> list[tuple[str, Tensor]]:
        """The tensors, with their names, that the optimizer has put into its state, new or in place of others."""
        known = {id(each): contents for each, contents in self._contents}
        return [
            (name, x)
            for state in self._optimizer.state.values()
            for name, x in state.items()
            if isinstance(x, Tensor) and known.get(id(state), {}).get(name) is not x
        ]

    def drew_on_the_host(self) -> bool:
        """Whether a step of a GPU has drawn random numbers on the CPU."""
        return self._gpu_random is not None and not torch.equal(torch.get_rng_state(), self._host_random)
