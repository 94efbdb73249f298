"""What the kernels of a norm exchange with the other ranks of its process group, as `common/ranks.py` says.

Between its two passes a kernel writes the numbers of this process to memory that Python shares, and calls back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import ranks

_Callback = ctypes.CFUNCTYPE(None)


class Exchange:
    """One exchange, while a kernel runs or without one.

    Args:
        numbers: float64 [3], written by the kernel: in the forward count, mean and M2 of what is normalised; in
            the backward, after the count, the sums of the gradient and of its product with the normalised values.
        merge: replaces this rank's numbers by those of all.
    """

    def __init__(self, numbers: Tensor, merge: Callable[[], object]) -> None:
        self._numbers, self._merge = numbers, merge

    def run(self, kernel: Any, arguments: Any) -> None:
        """Call a kernel, which calls back in this thread."""
        errors: list[BaseException] = []

        def merge() -> None:
            # What a callback raises, such as that a peer has died, would only be printed. The kernel goes on with
            # the numbers of this rank.
            try:
                self._merge()
            except BaseException as error:
                errors.append(error)

        callback = _Callback(merge)
        arguments.shared = self._numbers.data_ptr()
        arguments.exchange = ctypes.cast(callback, ctypes.c_void_p)
        kernel(ctypes.byref(arguments))
        if errors:
            # Popped, so that the error does not refer to itself by this frame.
            raise errors.pop()

    def run_empty(self) -> None:
        """Take part with no values, for which no kernel runs."""
        self._numbers.zero_()
        self._merge()


def new_moments(x: Tensor, group: str | None) -> Tensor:
    """Uninitialised numbers of the forward, which are kept for the backward; empty without a group."""
    return x.new_empty(0 if group is None else 3, dtype=torch.float64)


def of_moments(moments: Tensor, group: str | None) -> Exchange | None:
    """That of the forward."""
    if group is None:
        return None
    return Exchange(moments, lambda: moments.copy_(ranks.merge_moments(moments, group)))


def of_sums(moments: Tensor, group: str | None) -> Exchange | None:
    """That of the backward, from the moments of all ranks."""
    if group is None:
        return None
    # The count stays as it is.
    numbers = moments.clone()
    _, total, product = numbers
    return Exchange(numbers, lambda: numbers[1:].copy_(ranks.merge_sums(total, product, group)))
