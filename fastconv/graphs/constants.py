"""What a captured step takes for constant, and whether it still is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class Constants:
    """Things of one kind that a graph takes for constant.

    Args:
        names: of the things.
        read: returns what is to be constant of each, mostly a number. Every call of a step compares it.
        event: what has happened to one that is different, after its name.
        kind: what they are, in the plural.
        kept: objects of which `read` returns the ids, so that no others get them.
    """

    def __init__(
        self, names: Sequence[str], read: Callable[[], list[Any]], event: str, kind: str, kept: object = None
    ) -> None:
        self._names, self._read, self._event, self._kind, self._kept = names, read, event, kind, kept
        self._captured = read()

    def change(self) -> str | None:
        """What has changed first, as the beginning of a sentence, or None."""
        now = self._read()
        if now == self._captured:
            return None
        if len(now) != len(self._captured):
            return f"{self._kind} were added or removed"
        things = zip(self._names, self._captured, now, strict=True)
        return f"{next(name for name, was, found in things if was != found)} {self._event}"


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
        groups = optimizer.param_groups
        keys = [(i, key) for i, group in enumerate(groups) for key in group if key != "params"]
        return [
            Constants(
                [f"{name}.{key}" for name, x in self._modules.items() for each in _registries(x) for key in each],
                lambda: [*map(id, chain.from_iterable(map(dict.values, self.registries)))],
                "was replaced",
                "parameters, buffers or modules",
                (tensors, modules),
            ),
            Constants(
                [*tensors.values()],
                lambda: [*map(Tensor.data_ptr, tensors)],
                "was moved to other memory",
                "tensors",
            ),
            Constants(
                [*self.parameters.values()],
                lambda: [x.requires_grad for x in parameters],
                "was frozen or unfrozen",
                "parameters",
            ),
            Constants(
                [*self._modules],
                lambda: [x.training for x in modules],
                "was set to another mode (train or eval)",
                "modules",
            ),
            Constants(
                [self.parameters[x] for group in groups for x in group["params"]],
                lambda: [id(x) for group in optimizer.param_groups for x in group["params"]],
                "was replaced in the optimizer",
                "parameters of the optimizer",
                tensors,
            ),
            Constants(
                [f"{key} of the optimizer's group {i}" for i, key in keys],
                lambda: [_value(optimizer.param_groups[i].get(key)) for i, key in keys],
                "was changed (only a tensor on the GPU may be, in place)",
                "hyperparameters",
                [groups[i][key] for i, key in keys],
            ),
        ]

    def constants_of_state(self) -> Constants:
        """The optimizer's state, which the first step may still add to."""
        optimizer = self._optimizer

        def dicts() -> list[Any]:
            return [optimizer.state, *optimizer.state.values()]

        return Constants(
            ["the optimizer's state"] * len(dicts()),
            lambda: [*map(id, dicts())],
            "was replaced (as by load_state_dict)",
            "states of the optimizer",
            dicts(),
        )


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _value(hyperparameter: Any) -> Any:
    """A number as it is; of a tensor, which one it is."""
    return id(hyperparameter) if isinstance(hyperparameter, Tensor) else hyperparameter
