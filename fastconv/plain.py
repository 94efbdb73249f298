"""Whether a submodule may be computed from its parameters and settings, instead of being called."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Quantized and distributed weights have types of their own, and few operations.
_PARAMETERS = frozenset((nn.Parameter, Tensor, type(None)))

# As they were when fastconv was imported: others may replace the forward of a whole class.
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GELU)
}


def is_plain(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a submodule would run the forward of `kind` on plain parameters, and nothing else.

    It does not for another class (a subclass, an adapter, a parametrized or sharded module), a forward that was
    replaced on the instance (as for offloaded weights) or in the class, and hooks (pruning, weight_norm), those of
    all modules included. Called for each part at each forward, it takes about a microsecond.
    """
    # Attributes, and not the instance's dict, of which Dynamo would not notice a change; and not getattr with a
    # default, for which Dynamo of torch 2.14 takes the default of a method's `__func__`.
    forward = part.forward
    if type(part) is not kind or not isinstance(forward, MethodType):
        return False
    if forward.__func__ is not _FORWARDS.get(kind, kind.forward):
        return False
    if "_conv_forward" in part.__dict__:
        return False
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return False
    if nn.modules.module._has_any_global_hook():
        return False
    # A compiler has parameters of its own types.
    return torch.compiler.is_compiling() or _PARAMETERS.issuperset(map(type, part._parameters.values()))
