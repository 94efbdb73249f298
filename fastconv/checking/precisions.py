"""The dtypes and precisions in which results are checked, and timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastconv.accuracy import FLOOR, TF32_FLOOR


class Precision(NamedTuple):
    """How float32 or half precision tensors are computed with, and the error below which all results are right."""

    dtype: torch.dtype
    floor: float
    matmul: str = "highest"
    autocast: bool = False


PRECISIONS = {
    "float32": Precision(torch.float32, FLOOR[torch.float32]),
    # PyTorch computes some convolutions in float32 nevertheless: its error is no measure of ours.
    "tf32": Precision(torch.float32, TF32_FLOOR, matmul="high"),
    "float16": Precision(torch.float16, FLOOR[torch.float16]),
    "bfloat16": Precision(torch.bfloat16, FLOOR[torch.bfloat16]),
    "autocast": Precision(torch.float32, FLOOR[torch.bfloat16], autocast=True),
}


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Compute float32 products and convolutions in a precision of `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
