// Vectors of as many floats as a register holds, in the vector types of GCC and Clang: AVX-512, AVX2, NEON, SSE.
#pragma once
#include <cstddef>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 16")

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

// How many sums a loop may hold in registers follows from their number.
#ifndef REGISTERS
#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#endif
constexpr bool MANY_REGISTERS = REGISTERS >= 32;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int Integers __attribute__((vector_size(4 * LANES)));
// Where an address need not be a multiple of the vector's size.
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4), may_alias));

INLINE Vector broadcast(float x) { return Vector{} + x; }
INLINE Vector load(const float* from) { return *(const Unaligned*)from; }
INLINE void store(float* to, Vector x) { *(Unaligned*)to = x; }
// The first lanes alone, whose memory may end with them; the others are those of `rest`.
INLINE Vector load(const float* from, int lanes, Vector rest = Vector{}) {
    if (lanes == LANES) return load(from);
    memcpy(&rest, from, lanes * sizeof(float));
    return rest;
}
INLINE void store(float* to, Vector x, int lanes) {
    if (lanes == LANES) store(to, x);
    else memcpy(to, &x, lanes * sizeof(float));
}

// As many doubles as a vector has floats: two vectors, since GCC computes those beyond a register's size in memory.
typedef float HalfVector __attribute__((vector_size(2 * LANES)));
typedef double HalfDoubles __attribute__((vector_size(4 * LANES)));
struct Doubles {
    HalfDoubles low, high;
};
INLINE Doubles operator+(Doubles x, Doubles y) { return {x.low + y.low, x.high + y.high}; }
INLINE Doubles operator-(Doubles x, Doubles y) { return {x.low - y.low, x.high - y.high}; }
INLINE Doubles operator*(Doubles x, Doubles y) { return {x.low * y.low, x.high * y.high}; }
INLINE Doubles operator*(Doubles x, double y) { return {x.low * y, x.high * y}; }
INLINE Doubles operator/(Doubles x, double y) { return {x.low / y, x.high / y}; }
INLINE Doubles operator+(Doubles x, double y) { return {x.low + y, x.high + y}; }
INLINE void operator+=(Doubles& x, Doubles y) { x = x + y; }
INLINE Doubles load(const double* from) {
    Doubles x;
    memcpy(&x, from, sizeof x);
    return x;
}
INLINE void store(double* to, Doubles x) { memcpy(to, &x, sizeof x); }
INLINE Doubles widen(Vector x) {
    HalfVector halves[2];
    memcpy(halves, &x, sizeof x);
    return {__builtin_convertvector(halves[0], HalfDoubles), __builtin_convertvector(halves[1], HalfDoubles)};
}
INLINE Vector narrow(Doubles x) {
    const HalfVector halves[2] = {__builtin_convertvector(x.low, HalfVector), __builtin_convertvector(x.high, HalfVector)};
    Vector all;
    memcpy(&all, halves, sizeof all);
    return all;
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int QuadIndex __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadIndex{__VA_ARGS__})
#endif

// A vector's sum of its quarters, or halves: four numbers with the same sum.
INLINE Quad folded(Vector x) {
    Quad parts[LANES / 4];
    memcpy(parts, &x, sizeof x);
    for (int half = LANES / 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
}

// The sums of four vectors' lanes.
INLINE Quad sums(Vector x0, Vector x1, Vector x2, Vector x3) {
    Quad a = folded(x0), b = folded(x1), c = folded(x2), d = folded(x3);
    Quad ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
    Quad cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
    return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
}

INLINE float sum(Vector x) {
    Quad q = folded(x);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

INLINE double sum(Doubles x) {
    double lanes[LANES], total = 0;
    memcpy(lanes, &x, sizeof x);
    for (double lane : lanes) total += lane;
    return total;
}
