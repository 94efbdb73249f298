// GELU (Hendrycks and Gimpel, arXiv:1606.08415), z cdf(z), and its derivative.
#pragma once
#include "vector.h"

struct Gelu {
    Vector value, derivative;
};

// NaN stays NaN.
INLINE Vector clamp(Vector x, float low, float high) {
    x = x < low ? broadcast(low) : x;
    return x > high ? broadcast(high) : x;
}

// e^x for |x| <= 87, to about one unit in the last place, by Cody and Waite's reduction.
INLINE Vector exponential(Vector x) {
    // Adding 1.5 * 2^23 rounds to an integer, which the sum's low bits are then.
    const Vector shifted = x * 1.44269504f + 12582912.f;
    const Vector n = shifted - 12582912.f;
    const Integers exponent = (Integers)shifted << 23;
    x = x - n * 0.693359375f;
    x = x + n * 2.12194440e-4f;
    const Vector square = x * x;
    Vector p = (x * 1.9875691500e-4f + 1.3981999507e-3f) * square + (x * 8.3334519073e-3f + 4.1665795894e-2f);
    p = p * square + (x * 1.6666665459e-1f + 5.0000001201e-1f);
    p = p * square + (x + 1.f);
    return (Vector)((Integers)p + exponent);
}

// The error function of x / sqrt(2), to 2e-7: a rational minimax approximation, for |x| up to 4 sqrt(2).
INLINE Vector error_function(Vector x) {
    x = clamp(x, -5.65685425f, 5.65685425f) * 0.70710678f;
    const Vector q = x * x;
    Vector a = q * -2.72614225801306e-10f + 2.77068142495902e-08f;
    a = a * q - 2.10102402082508e-06f;
    a = a * q - 5.69250639462346e-05f;
    a = a * q - 7.34990630326855e-04f;
    a = a * q - 2.95459980854025e-03f;
    a = a * q - 1.60960333262415e-02f;
    Vector b = q * -1.45660718464996e-05f - 2.13374055278905e-04f;
    b = b * q - 1.68282697438203e-03f;
    b = b * q - 7.37332916720468e-03f;
    b = b * q - 1.42647390514189e-02f;
    return x * a / b;
}

// Below these bounds GELU and its derivative are 0 in float32, which the rounded functions of them are only almost.
constexpr float LEAST_OF_ERF = -6.f, LEAST_OF_TANH = -9.9f;

INLINE Gelu zero_below(Vector z, float least, Vector value, Vector derivative) {
    return {z < least ? Vector{} : value, z < least ? Vector{} : derivative};
}

INLINE Gelu gelu_of_erf(Vector z) {
    const Vector cdf = error_function(z) * 0.5f + 0.5f, near = clamp(z, -13.f, 13.f);
    const Vector density = exponential(near * near * -0.5f) * 0.39894228f;
    return zero_below(z, LEAST_OF_ERF, z * cdf, cdf + near * density);
}

// By tanh: cdf(z) = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), where u = sqrt(2 / pi) (z + 0.044715 z^3).
INLINE Gelu gelu_of_tanh(Vector z) {
    const Vector near = clamp(z, LEAST_OF_TANH, -LEAST_OF_TANH), square = near * near;
    const Vector doubled = near * (square * (2 * 0.79788456f * 0.044715f) + 2 * 0.79788456f);
    const Vector cdf = 1.f / (exponential(-doubled) + 1.f);
    const Vector rise = square * (6 * 0.79788456f * 0.044715f) + 2 * 0.79788456f;
    return zero_below(z, LEAST_OF_TANH, z * cdf, cdf + near * (cdf * (1.f - cdf) * rise));
}

template <bool TANH> INLINE Gelu gelu(Vector z) {
    if constexpr (TANH) return gelu_of_tanh(z);
    else return gelu_of_erf(z);
}
