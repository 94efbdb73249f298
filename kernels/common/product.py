"""The arithmetic that kernels share: products in the precision asked for, exact division, and widening."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a [I, J] @ b [J, K], accumulated in float32 (float64 for float64 operands).

    PRECISION says how float32 operands are multiplied: "ieee", "tf32x3", "tf32", or "bf16".
    """
    if a.dtype == tl.float64:
        result = tl.dot(a, b, out_dtype=tl.float64, input_precision="ieee")
    elif a.dtype != tl.float32:
        result = tl.dot(a, b)
    elif PRECISION == "bf16":
        result = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        result = tl.dot(a, b, input_precision=PRECISION)
    return result


@triton.jit
def widen(x):
    """To the dtype to compute in: float32, or float64 if `x` is."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: `/` of float32 is up to 2 units in the last place off on NVIDIA's GPUs.

    That shows where a large mean is subtracted.
    """
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)
