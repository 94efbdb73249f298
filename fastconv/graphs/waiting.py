"""Finds operators that a graph cannot hold, because the host waits for what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv.graphs.capturing import CaptureError

_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class RefuseWaiting(TorchDispatchMode):
    """Raises CaptureError at an operator whose result, or its size, goes from `device` to the host.

    Operators that another one calls inside of PyTorch are not seen; the capture refuses those.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs) and args[0].device == self._device:
            raise CaptureError(
                f"the step calls {func} on {self._device}, and the host waits for the result; expected results "
                "that stay in tensors of known sizes, as with torch.where instead of an `if` or a mask"
            )
        return func(*args, **kwargs)


def _waits(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return not _WAITING.isdisjoint(func.tags)
