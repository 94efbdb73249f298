"""Whether others than autograd are to see each operation: they know what PyTorch's own operations mean."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fastconv.kernels.common.rules import is_transformed
from fastconv.kernels.common.values import Value
from fastconv.operations import backends, setting

# What the fields of values are; the characters of a string are strings.
_PLAIN = {Tensor, nn.Parameter, type(None), str, float, int}


def is_symbolic(x: Any) -> bool:
    """Whether x stands for maps of any size, in a graph that torch.fx or torch.jit.trace records."""
    return torch._C._get_tracing_state() is not None or isinstance(x, Proxy)


def is_composed(x: Tensor, *values: Value) -> bool:
    """Whether what is computed from maps and values is to be composed of PyTorch's own operations.

    It is for transforms and, unless a backend is forced, for exported programs, which may run for any batch and
    where there is no fastconv, and for those who watch.
    """
    if torch.compiler.is_compiling():
        from fastconv.operations import tracing

        return tracing.is_transformed() or (torch.compiler.is_exporting() and backends.current() == "auto")
    return is_transformed() or (setting.current() == "auto" and is_watched(x, *values))


def is_watched(x: Tensor, *values: Value) -> bool:
    """Whether a mode or a tensor of another class is to see what is computed from maps and values.

    Modes are those of torch.utils._python_dispatch, such as make_fx's, fake tensors' and FLOP counters'. Maps on
    the meta device are computed for their shape and strides, which are those of PyTorch's operations there.
    """
    if torch._C._len_torch_dispatch_stack() > 0 or type(x) not in _PLAIN or x.is_meta:
        return True
    return not _PLAIN.issuperset(map(type, chain.from_iterable(values)))
