"""A classifier's parameters and AdamW's state as flat vectors, of which model and optimizer have views."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..optimizer.tiling import adamw_hyperparameters

# Parameters of a block in the order in which the kernels of its backward write their gradients.
BLOCK = ("conv2.weight", "conv3.weight", "conv2.bias", "conv3.bias", "conv1.weight", "conv1.bias")
# What torch.optim.AdamW is asked to do otherwise than the kernel.
VARIANTS = ("amsgrad", "maximize")


def parameter_names(depth: int) -> list[str]:
    """The names of a Classifier's parameters in the order of the flat vectors; a stage has `depth` blocks."""
    stages = [[f"conv_block_{stage}.{i}.{name}" for i in range(depth) for name in BLOCK] for stage in (1, 2)]
    ends = [[f"{part}.weight", f"{part}.bias"] for part in ("stem", "downsample", "bottleneck")]
    return [*ends[0], *stages[0], *ends[1], *stages[1], *ends[2]]


class State:
    """What a step of training changes: all parameters are one vector, and so are their moments in AdamW.

    The model and the optimizer keep their values, but their tensors become views of these vectors, so that their
    state_dicts stay PyTorch's own. What replaces these tensors, as the optimizer's `load_state_dict` does, needs a
    new State afterwards; what changes parameters in place needs a call of `round`.

    Args:
        model: a Classifier, whose parameters are on one device, all in float32 (or float64).
        optimizer: of exactly these parameters, in one group.
        dtype: in which kernels read the parameters.

    Attributes:
        parameters, gradients, exp_avg, exp_avg_sq: [L], in the order of `parameter_names`, with zeros behind them.
        steps: AdamW's counter of each parameter, [parameters].
        rounded: [L], the parameters in `dtype`, or None if they are in it.
        hyperparameters: AdamW's, float64 [5], as `adamw_hyperparameters` makes them.
        weights: views of what kernels read, by name.

    Raises:
        ValueError: the optimizer is for other parameters, or a variant of AdamW.
    """

    def __init__(self, model: Any, optimizer: torch.optim.AdamW, dtype: torch.dtype) -> None:
        named: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._sizes = {name: named[name].shape for name in parameter_names(len(model.conv_block_1))}
        ordered = [named[name] for name in self._sizes]
        group = _only_group(optimizer, ordered)
        device = ordered[0].device
        states = [optimizer.state.get(p) or _new_state(p) for p in ordered]

        self.parameters = _flat(p.detach() for p in ordered)
        self.gradients = torch.zeros_like(self.parameters)
        self.exp_avg = _flat(state["exp_avg"] for state in states)
        self.exp_avg_sq = _flat(state["exp_avg_sq"] for state in states)
        self.steps = torch.stack([state["step"].to(device) for state in states])
        numbers = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
        self.hyperparameters = adamw_hyperparameters(*map(float, numbers)).to(device)
        self.rounded = None if dtype == self.parameters.dtype else self.parameters.to(dtype)
        self.weights = self.views(self.parameters if self.rounded is None else self.rounded)

        parameters, exp_avg, exp_avg_sq = map(self.views, (self.parameters, self.exp_avg, self.exp_avg_sq))
        steps = dict(zip(self._sizes, self.steps, strict=True))
        # In the model's order, which is that of a state_dict.
        for name, p in named.items():
            p.data = parameters[name]
            optimizer.state[p] = {"step": steps[name], "exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector [L] by the names of the parameters, whose shapes they have."""
        counts = [size.numel() for size in self._sizes.values()]
        parts = vector[: sum(counts)].split(counts)
        return {name: part.view(size) for (name, size), part in zip(self._sizes.items(), parts, strict=True)}

    def round(self) -> None:
        """Renew what kernels read of parameters that something else than a step changed."""
        if self.rounded is not None:
            self.rounded.copy_(self.parameters)


def _only_group(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter]) -> dict[str, Any]:
    groups = optimizer.param_groups
    given = [id(p) for group in groups for p in group["params"]]
    if len(groups) > 1 or set(given) != {id(p) for p in parameters}:
        raise ValueError(
            f"the optimizer has {len(given)} parameters in {len(groups)} groups; expected the classifier's "
            f"{len(parameters)} in one: pass AdamW model.parameters()"
        )
    for name in VARIANTS:
        if groups[0][name]:
            raise ValueError(f"the optimizer has {name}=True; expected False: the kernel has no such variant")
    return groups[0]


def _new_state(p: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's before the first step."""
    zeros = torch.zeros_like(p, requires_grad=False)
    return {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements as one vector, of a length that `adamw_launch` has wide accesses for."""
    vector = torch.cat([x.flatten() for x in tensors])
    return F.pad(vector, (0, -len(vector) % 16))
