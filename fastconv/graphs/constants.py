"""What a captured step takes for constant, and whether it still is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class Constants:
    """Things of one kind that a graph takes for constant.

    Args:
        names: of the things.
        read: returns them as they are now. Every step calls it.
        same: whether one is as it was.
        event: what has happened to one that is not, after its name.
        kind: what they are, in the plural.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[], list[Any]],
        same: Callable[[Any, Any], bool],
        event: str,
        kind: str,
    ) -> None:
        self._names, self._read, self._same, self._event, self._kind = names, read, same, event, kind
        self._captured = read()

    def change(self) -> str | None:
        """What has changed first, as the beginning of a sentence, or None."""
        now = self._read()
        if len(now) != len(self._captured):
            return f"{self._kind} were added or removed"
        if all(map(self._same, self._captured, now)):
            return None
        things = zip(self._names, self._captured, now, strict=True)
        return f"{next(name for name, was, found in things if not self._same(was, found))} {self._event}"


class Structure:
    """What a step consists of: modules, the tensors that they hold, and the optimizer.

    Args:
        roots: modules by name, such as "model".
        optimizer: its parameters count as well where no module has them.

    Attributes:
        parameters, buffers: with their names.
        registries: where modules look up their parameters, buffers and submodules.
    """

    def __init__(self, roots: dict[str, nn.Module], optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._modules = {
            name: x for root, module in roots.items() for name, x in module.named_modules(prefix=root)
        }
        self.parameters: dict[Tensor, str] = {
            x: name for root, module in roots.items() for name, x in module.named_parameters(root)
        }
        self.buffers: dict[Tensor, str] = {
            x: name for root, module in roots.items() for name, x in module.named_buffers(root)
        }
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                self.parameters.setdefault(parameter, f"parameter {j} of the optimizer's group {i}")
        self.registries = [each for module in self._modules.values() for each in _registries(module)]

    def constants(self) -> list[Constants]:
        """All but those of `constants_of_state`."""
        optimizer, modules, parameters = self._optimizer, list(self._modules.values()), list(self.parameters)
        tensors = {**self.parameters, **self.buffers}
        keys = [(i, key) for i, group in enumerate(optimizer.param_groups) for key in group if key != "params"]
        return [
            Constants(
                [f"{name}.{key}" for name, x in self._modules.items() for each in _registries(x) for key in each],
                lambda: [*chain.from_iterable(map(dict.values, self.registries))],
                operator.is_,
                "was replaced",
                "parameters, buffers or modules",
            ),
            Constants(
                [*tensors.values()],
                lambda: [x.data_ptr() for x in tensors],
                operator.eq,
                "was moved to other memory",
                "tensors",
            ),
            Constants(
                [*self.parameters.values()],
                lambda: [x.requires_grad for x in parameters],
                operator.eq,
                "was frozen or unfrozen",
                "parameters",
            ),
            Constants(
                [*self._modules],
                lambda: [x.training for x in modules],
                operator.eq,
                "was set to another mode (train or eval)",
                "modules",
            ),
            Constants(
                [self.parameters[x] for x in _parameters(optimizer)],
                lambda: _parameters(optimizer),
                operator.is_,
                "was replaced in the optimizer",
                "parameters of the optimizer",
            ),
            Constants(
                [f"{key} of the optimizer's group {i}" for i, key in keys],
                lambda: [optimizer.param_groups[i].get(key) for i, key in keys],
                _same_value,
                "was changed (only a tensor on the GPU may be, in place)",
                "hyperparameters",
            ),
        ]

    def constants_of_state(self) -> Constants:
        """The optimizer's state, which the first step may still add to."""
        optimizer = self._optimizer

        def read() -> list[Any]:
            return [optimizer.state, *optimizer.state.values()]

        names = ["the optimizer's state"] * len(read())
        return Constants(
            names, read, operator.is_, "was replaced (as by load_state_dict)", "states of the optimizer"
        )


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _same_value(was: Any, found: Any) -> bool:
    return was is found or (not isinstance(found, Tensor) and bool(was == found))
