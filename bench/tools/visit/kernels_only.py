"""Runs code for a GPU without one, so that Triton compiles the kernels that it launches.

Kernels compute nothing here, so nothing else need be computed either: tensors have shapes, strides and dtypes, and
lie on the CPU. What the code returns, or asserts, means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastconv import accuracy
from fastconv.checking import runner
from fastconv.operations import backends, watchers
from fastconv.training import stepper
from fastconv.training.state import State

from ..null_gpu import null_gpu


class Uncomputed(TorchDispatchMode):
    """PyTorch's operations compute nothing: they return new memory with the shape and strides of their results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aliases = any(value.alias_info for value in (*func._schema.arguments, *func._schema.returns))
        if func.namespace != "aten" or aliases:
            return func(*args, **kwargs)
        on_meta = {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
        try:
            described = func(*tree_map_only(Tensor, _like, args), **tree_map_only(Tensor, _like, kwargs) | on_meta)
        except (RuntimeError, NotImplementedError):
            # Its result depends on values, or on a generator of random numbers.
            return func(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: _like(x, "cpu"), described)


def _like(x: Tensor, device: str = "meta") -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


@contextmanager
def kernels_only() -> Iterator[None]:
    """Meanwhile fastconv runs its kernels, on no GPU, and `accuracy.measure` judges nothing.

    Raises:
        RuntimeError: as `null_gpu`.
    """
    with null_gpu(), ExitStack() as stack:
        for owner, name, replacement in (
            (backends, "can_run", _can_run),
            # For a mode, as `Uncomputed` is, operations would be composed of PyTorch's own.
            (watchers, "is_watched", lambda *_: False),
            (accuracy, "measure", _once),
            (runner, "choose_backend", lambda case, device: ("triton", "")),
            (runner, "interprets", lambda backend, device: False),
            (State, "check_finite", lambda *_: None),
            (stepper, "mean_loss", lambda *_: 0.0),
            *((torch.cuda, name, replacement) for name, replacement in _CUDA.items()),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def gpu_found() -> AbstractContextManager[object]:
    """Meanwhile PyTorch says that there is a GPU: for code that asks once, and not for PyTorch's compiler."""
    return mock.patch.object(torch.cuda, "is_available", return_value=True)


def _can_run(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return "its kernels do not take float64" if backend == "triton" and dtype == torch.float64 else None


def _once(sample: Callable[[], object], *_: Any, **__: Any) -> dict[str, accuracy.Error]:
    """A stand-in for `accuracy.measure`: launches the kernels of one sample, and measures no error."""
    with Uncomputed():
        sample()
    return {}


# What tests and benchmarks call of torch.cuda, for a GPU that is not there.
_CUDA: dict[str, Any] = {
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (0, 0),
    "synchronize": lambda device=None: None,
    "set_sync_debug_mode": lambda mode: None,
    "current_stream": mock.MagicMock(),
    "Stream": mock.MagicMock(),
    "CUDAGraph": mock.MagicMock(),
    "stream": lambda stream: nullcontext(),
    "graph": lambda graph, **_: nullcontext(),
}
