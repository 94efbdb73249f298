"""Products of matrices in each precision of tl.dot, as tensor cores compute them."""

import dataclasses

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from . import bfloat16
from .replacing import replace

# All that the compiler of this version knows: the interpreter's own list lacks the last two.
PRECISIONS = tuple(name.lower() for name in interpreter._ir.INPUT_PRECISION.__members__)
# The products that Triton's pass F32DotTC sums, in its order: (part of a, part of b), 0 being the largest.
SMALL_PRODUCTS = {
    "TF32x3": ((1, 0), (0, 1)),
    "BF16x3": ((1, 0), (0, 1)),
    "BF16x6": ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1)),
}


def install():
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, allowed_dot_input_precisions=PRECISIONS
    )
    replace(InterpreterBuilder, "create_dot", _dot)


def truncate_to_tf32(values):
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_to_tf32(values):
    """As cvt.rna does: to nearest, ties away from zero."""
    rounded = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _parts(values, precision):
    """The float32 values as a sum of narrower ones."""
    if precision == "TF32x3":
        big = round_to_tf32(values)
        return big, truncate_to_tf32(values - big)
    parts = []
    for _ in range(3 if precision == "BF16x6" else 2):
        parts.append(bfloat16.to_float32(bfloat16.from_float32(values)))
        values = values - parts[-1]
    return parts


def _float32_dot(a, b, precision):
    if precision == "IEEE":
        return np.matmul(a, b)
    if precision == "TF32":
        # The compiled code has no cvt: the tensor cores themselves ignore the low 13 bits (triton issue 4574).
        return np.matmul(truncate_to_tf32(a), truncate_to_tf32(b))
    a, b = _parts(a, precision), _parts(b, precision)
    small = sum(np.matmul(a[i], b[j]) for i, j in SMALL_PRODUCTS[precision])
    # As the pass does: what is left of an infinity is NaN.
    return np.where(np.isnan(small), np.float32(0), small) + np.matmul(a[0], b[0])


def _dot(create_dot):
    def corrected(self, a, b, accumulator, precision, *rest):
        if a.data.dtype != np.float32:
            return create_dot(self, bfloat16.widen(a), bfloat16.widen(b), accumulator, precision, *rest)
        product = _float32_dot(a.data, b.data, precision.name)
        return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    return corrected
