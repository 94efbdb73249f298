"""GELU and its derivative (Hendrycks and Gimpel, arXiv:1606.08415), exactly as PyTorch defines both forms."""

import triton
import triton.language as tl


@triton.jit
def gelu(z, APPROXIMATE: tl.constexpr):
    """z * Phi(z), with Phi the normal distribution function, or its approximation by tanh."""
    _check(APPROXIMATE)
    if APPROXIMATE == "tanh":
        return z * tl.sigmoid(_tanh_argument(z))
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_derivative(z, APPROXIMATE: tl.constexpr):
    """The derivative of `gelu` at z."""
    _check(APPROXIMATE)
    if APPROXIMATE == "tanh":
        probability = tl.sigmoid(_tanh_argument(z))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        return probability + z * probability * (1.0 - probability) * slope
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density


@triton.jit
def _check(APPROXIMATE: tl.constexpr):
    """Refuse at compile time an activation that would be taken for the exact GELU."""
    tl.static_assert(APPROXIMATE == "none" or APPROXIMATE == "tanh", 'APPROXIMATE is "none" or "tanh"')


@triton.jit
def _tanh_argument(z):
    # (1 + tanh(t)) / 2 = sigmoid(2 t), with t = sqrt(2 / pi) * (z + 0.044715 z^3).
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)
