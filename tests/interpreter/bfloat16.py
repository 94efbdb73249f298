"""Arithmetic in bfloat16: the interpreter keeps it as uint16, and, uncorrected, computes with its bits."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .replacing import replace


def install():
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        replace(InterpreterBuilder, name, _in_float32)
    replace(InterpreterBuilder, "cast_impl", _cast)
    replace(interpreter.ReduceOps, "apply_impl", _reduce_in_steps)
    for name in ("cumsum", "cumprod"):
        replace(interpreter.ScanOps, name, _scan_in_steps)


def to_float32(bits):
    """Decode bits of bf16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float32(values):
    """Round to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def is_bfloat16(value):
    # A comparison's handle may name the dtype of its operands: the data decide.
    return isinstance(value, TensorHandle) and value.data.dtype == np.uint16 and value.dtype.scalar == tl.bfloat16


def widen(value):
    return TensorHandle(to_float32(value.data), tl.float32) if is_bfloat16(value) else value


def _narrow(value):
    if value.data.dtype == np.bool_:
        return TensorHandle(value.data, tl.int1)
    return TensorHandle(from_float32(value.data), tl.bfloat16)


def _in_float32(operation):
    # One operation in float32, rounded, is the operation in bf16: float32 has more than twice the digits.
    def corrected(self, *values):
        if not any(map(is_bfloat16, values)):
            return operation(self, *values)
        return _narrow(operation(self, *map(widen, values)))

    return corrected


def _cast(cast_impl):
    def corrected(self, value, dtype):
        if dtype.scalar == tl.bfloat16:
            return (
                value if is_bfloat16(value) else _narrow(TensorHandle(value.data.astype(np.float32), tl.float32))
            )
        return cast_impl(self, widen(value), dtype)

    return corrected


def _reduce_in_steps(apply_impl):
    # A GPU rounds every partial sum to bf16: tl.sum compiles to add.bf16.
    def corrected(self, inputs):
        if any(x.dtype == tl.bfloat16 for x in inputs):
            return self.generic_reduce(inputs)
        return apply_impl(self, inputs)

    return corrected


def _scan_in_steps(scan):
    def corrected(self, value):
        return self.generic_scan((value,)) if value.dtype == tl.bfloat16 else scan(self, value)

    return corrected
