"""Which device is the current one. Imports no Triton, so that operators of every kind can."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_HERE = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of `x` the current one meanwhile, if it is on one."""
    index = x.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)
