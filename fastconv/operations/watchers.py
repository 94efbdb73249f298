"""Whether others than autograd are to see each operation: they know what PyTorch's own operations mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastconv.kernels.common.values import Value, tensors_in

_PLAIN = {Tensor, nn.Parameter}


def is_watched(x: Tensor, *values: Value) -> bool:
    """Whether a tracer, a mode or a tensor of another class is to see what is computed from maps and values.

    Tracers are torch.jit.trace and the older torch.onnx.export; modes are those of torch.utils._python_dispatch,
    such as make_fx's, fake tensors' and FLOP counters'.
    """
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return type(x) not in _PLAIN or not _PLAIN.issuperset(map(type, tensors_in(*values)))
