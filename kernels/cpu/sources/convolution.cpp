#include "convolution.h"

#include <type_traits>

namespace {

template <int VALUE> using Constant = std::integral_constant<int, VALUE>;

// The rows of the input under row `i` of the output, and the first of them.
INLINE int first_row(const Stencil& s, int i) { return i > s.kernel_height / 2 ? i - s.kernel_height / 2 : 0; }
INLINE int end_row(const Stencil& s, int i) {
    int end = i + s.kernel_height / 2 + 1;
    return end < s.height ? end : s.height;
}

// A map [pixels] within its frame.
void put_in_frame(const Stencil& s, const Vector* map, Vector* frame) {
    const size_t row = s.width, before = s.before(), pitch = s.pitch();
    for (int i = 0; i < s.height; ++i, map += row, frame += pitch) {
        memset(frame, 0, before * sizeof(Vector));
        memcpy(frame + before, map, row * sizeof(Vector));
        memset(frame + before + row, 0, (pitch - before - row) * sizeof(Vector));
    }
}

constexpr int within(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// Columns [FIRST, END) of all rows of outputs [0, OUTPUTS) of a map of WIDTH columns, under a kernel of 7.
template <int WIDTH, int FIRST, int END, int OUTPUTS>
INLINE void convolve_columns(const Stencil& s, const Vector* x, const float* taps, Vector* h, size_t stride, Vector* sums) {
    constexpr int LOW = within(FIRST - 3, 0, WIDTH), HIGH = within(END + 3, 0, WIDTH);
    Vector sum[OUTPUTS];
    UNROLL for (int t = 0; t < OUTPUTS; ++t) sum[t] = FIRST == 0 ? Vector{} : sums[t];
    for (int i = 0; i < s.height; ++i) {
        Vector out[OUTPUTS][END - FIRST] = {};
        for (int r = first_row(s, i); r < end_row(s, i); ++r) {
            Vector row[HIGH - LOW];
            UNROLL for (int j = LOW; j < HIGH; ++j) row[j - LOW] = x[r * WIDTH + j];
            const float* tap = taps + (r - i + s.kernel_height / 2) * 7;
            UNROLL for (int d = 0; d < 7; ++d)
                UNROLL for (int t = 0; t < OUTPUTS; ++t)
                    UNROLL for (int j = FIRST; j < END; ++j)
                        if (j + d - 3 >= 0 && j + d - 3 < WIDTH)
                            out[t][j - FIRST] += row[within(j + d - 3 - LOW, 0, HIGH - LOW - 1)] * tap[t * s.taps() + d];
        }
        UNROLL for (int t = 0; t < OUTPUTS; ++t)
            UNROLL for (int j = FIRST; j < END; ++j) {
                h[t * stride + (i * WIDTH + j)] = out[t][j - FIRST];
                sum[t] += out[t][j - FIRST];
            }
    }
    UNROLL for (int t = 0; t < OUTPUTS; ++t) sums[t] = sum[t];
}

template <int WIDTH, int OUTPUTS>
void convolve_map(const Stencil& s, const Vector* x, const float* taps, Vector* h, size_t stride, Vector* sums) {
    // With 16 registers, half of a row of 8 at once.
    constexpr int MIDDLE = MANY_REGISTERS || WIDTH <= 4 ? WIDTH : WIDTH / 2;
    convolve_columns<WIDTH, 0, MIDDLE, OUTPUTS>(s, x, taps, h, stride, sums);
    if constexpr (MIDDLE < WIDTH) convolve_columns<WIDTH, MIDDLE, WIDTH, OUTPUTS>(s, x, taps, h, stride, sums);
}

template <int WIDTH>
void convolve_outputs(const Stencil& s, int outputs, const Vector* x, const float* taps, Vector* h, size_t stride, Vector* sums) {
    int t = 0;
    for (; t + 2 <= outputs; t += 2)
        convolve_map<WIDTH, 2>(s, x, taps + t * s.taps(), h + t * stride, stride, sums + t);
    if (t < outputs) convolve_map<WIDTH, 1>(s, x, taps + t * s.taps(), h + t * stride, stride, sums + t);
}

// Columns [FIRST, END) of ROWS rows, from `q` on, of the gradient of a map of WIDTH columns, under a kernel of 7.
template <int WIDTH, int FIRST, int END, int ROWS>
INLINE void input_gradient_rows(const Stencil& s, int outputs, const Vector* g, size_t stride, const float* taps, int q, Vector* gx) {
    constexpr int LOW = within(FIRST - 3, 0, WIDTH), HIGH = within(END + 3, 0, WIDTH);
    const int half = s.kernel_height / 2;
    Vector out[ROWS][END - FIRST] = {};
    for (int t = 0; t < outputs; ++t)
        for (int i = first_row(s, q); i < end_row(s, q + ROWS - 1); ++i) {
            Vector row[HIGH - LOW];
            UNROLL for (int j = LOW; j < HIGH; ++j) row[j - LOW] = g[t * stride + i * WIDTH + j];
            // The row of taps between this row and row q; that for row q + 1 is the next.
            const int e = q - i + half;
            const float* tap = taps + t * s.taps() + e * 7;
            auto add_to = [&](auto first, auto end) INLINE_LAMBDA {
                UNROLL for (int d = 0; d < 7; ++d)
                    UNROLL for (int u = 0; u < ROWS; ++u)
                        UNROLL for (int c = FIRST; c < END; ++c)
                            if (u >= first && u < end && c - d + 3 >= 0 && c - d + 3 < WIDTH)
                                out[u][c - FIRST] += row[within(c - d + 3 - LOW, 0, HIGH - LOW - 1)] * tap[u * 7 + d];
            };
            if (e < 0) add_to(Constant<1>(), Constant<ROWS>());
            else if (e + ROWS > s.kernel_height) add_to(Constant<0>(), Constant<1>());
            else add_to(Constant<0>(), Constant<ROWS>());
        }
    UNROLL for (int u = 0; u < ROWS; ++u)
        UNROLL for (int c = FIRST; c < END; ++c) gx[((q + u) * WIDTH + c)] = out[u][c - FIRST];
}

template <int WIDTH>
void input_gradient_map(const Stencil& s, int outputs, const Vector* g, size_t stride, const float* taps, Vector* gx) {
    constexpr int MIDDLE = MANY_REGISTERS || WIDTH <= 4 ? WIDTH : WIDTH / 2;
    int q = 0;
    for (; q + 2 <= s.height; q += 2) {
        input_gradient_rows<WIDTH, 0, MIDDLE, 2>(s, outputs, g, stride, taps, q, gx);
        if constexpr (MIDDLE < WIDTH) input_gradient_rows<WIDTH, MIDDLE, WIDTH, 2>(s, outputs, g, stride, taps, q, gx);
    }
    if (q < s.height) input_gradient_rows<WIDTH, 0, WIDTH, 1>(s, outputs, g, stride, taps, q, gx);
}

// Adds the gradient of the taps of one output, its lanes not yet summed.
template <int WIDTH> void tap_gradient_map(const Stencil& s, int vectors, const Vector* g, const Vector* x, Vector* sums) {
    const int half = s.kernel_height / 2, pixels = s.pixels();
    for (int e = 0; e < s.kernel_height; ++e, sums += 7) {
        Vector tap[7];
        UNROLL for (int d = 0; d < 7; ++d) tap[d] = sums[d];
        const int first = half > e ? half - e : 0, last = s.height + (half < e ? half - e : 0);
        for (int b = 0; b < vectors; ++b)
            for (int i = first; i < last; ++i) {
                const Vector *from = x + b * pixels + (i + e - half) * WIDTH, *of = g + b * pixels + i * WIDTH;
                Vector row[WIDTH];
                UNROLL for (int j = 0; j < WIDTH; ++j) row[j] = from[j];
                UNROLL for (int j = 0; j < WIDTH; ++j) {
                    const Vector y = of[j];
                    UNROLL for (int d = 0; d < 7; ++d)
                        if (j + d - 3 >= 0 && j + d - 3 < WIDTH) tap[d] += y * row[within(j + d - 3, 0, WIDTH - 1)];
                }
            }
        UNROLL for (int d = 0; d < 7; ++d) sums[d] = tap[d];
    }
}

// The same on a frame of zeros, for any width and kernel.
void convolve_frame(const Stencil& s, const Vector* x, const float* taps, Vector* h, Vector* total) {
    constexpr int SEGMENT = Stencil::SEGMENT;
    Vector sum = {};
    for (int i = 0; i < s.height; ++i)
        for (int j = 0; j < s.width; j += SEGMENT) {
            Vector out[SEGMENT] = {};
            for (int r = first_row(s, i); r < end_row(s, i); ++r) {
                const float* tap = taps + (r - i + s.kernel_height / 2) * s.kernel_width;
                const Vector* from = x + r * s.pitch() + j;
                for (int d = 0; d < s.kernel_width; ++d, ++from)
                    UNROLL for (int c = 0; c < SEGMENT; ++c) out[c] += from[c] * tap[d];
            }
            UNROLL for (int c = 0; c < SEGMENT; ++c)
                if (j + c < s.width) {
                    h[i * s.width + j + c] = out[c];
                    sum += out[c];
                }
        }
    *total = sum;
}

void input_gradient_frame(const Stencil& s, int outputs, const Vector* g, const float* taps, Vector* gx) {
    constexpr int SEGMENT = Stencil::SEGMENT;
    for (int q = 0; q < s.height; ++q)
        for (int j = 0; j < s.width; j += SEGMENT) {
            Vector out[SEGMENT] = {};
            for (int t = 0; t < outputs; ++t)
                for (int i = first_row(s, q); i < end_row(s, q); ++i) {
                    // The last tap of a row first.
                    const float* tap = taps + t * s.taps() + (q - i + s.kernel_height / 2 + 1) * s.kernel_width - 1;
                    const Vector* from = g + t * s.frame() + i * s.pitch() + j;
                    for (int d = 0; d < s.kernel_width; ++d, ++from)
                        UNROLL for (int c = 0; c < SEGMENT; ++c) out[c] += from[c] * tap[-d];
                }
            UNROLL for (int c = 0; c < SEGMENT; ++c)
                if (j + c < s.width) gx[q * s.width + j + c] = out[c];
        }
}

void tap_gradient_frame(const Stencil& s, int vectors, const Vector* g, const Vector* x, Vector* sums) {
    constexpr int TAPS = Stencil::TAPS;
    const int half = s.kernel_height / 2;
    for (int e = 0; e < s.kernel_height; ++e)
        for (int d = 0; d < s.kernel_width; d += TAPS) {
            Vector tap[TAPS] = {};
            const int first = half > e ? half - e : 0, last = s.height + (half < e ? half - e : 0);
            for (int b = 0; b < vectors; ++b)
                for (int i = first; i < last; ++i) {
                    const Vector* row = x + b * s.frame() + (i + e - half) * s.pitch() + d;
                    const Vector* of = g + b * s.pixels() + i * s.width;
                    for (int j = 0; j < s.width; ++j)
                        UNROLL for (int u = 0; u < TAPS; ++u) tap[u] += of[j] * row[j + u];
                }
            for (int u = 0; u < TAPS && d + u < s.kernel_width; ++u) sums[e * s.kernel_width + d + u] += tap[u];
        }
}

// Call `f` with the width as a constant if there are functions of that width, else with 0.
template <class F> INLINE void with_width(const Stencil& s, F f) {
    switch (s.framed() ? 0 : s.width) {
        case 1: return f(Constant<1>());
        case 2: return f(Constant<2>());
        case 3: return f(Constant<3>());
        case 4: return f(Constant<4>());
        case 5: return f(Constant<5>());
        case 6: return f(Constant<6>());
        case 7: return f(Constant<7>());
        case 8: return f(Constant<8>());
        default: return f(Constant<0>());
    }
}

}  // namespace

void convolve(const Stencil& s, int outputs, const Vector* x, const float* taps, Vector* h, size_t stride, Vector* sums) {
    with_width(s, [&](auto width) {
        if constexpr (width > 0) return convolve_outputs<width>(s, outputs, x, taps, h, stride, sums);
        for (int t = 0; t < outputs; ++t)
            convolve_frame(s, x, taps + t * s.taps(), h + t * stride, sums + t);
    });
}

void input_gradient(const Stencil& s, int outputs, const Vector* g, size_t stride, const float* taps, Vector* gx, Vector* frames) {
    with_width(s, [&](auto width) {
        if constexpr (width > 0) return input_gradient_map<width>(s, outputs, g, stride, taps, gx);
        for (int t = 0; t < outputs; ++t) put_in_frame(s, g + t * stride, frames + t * s.frame());
        input_gradient_frame(s, outputs, frames, taps, gx);
    });
}

void tap_gradient(const Stencil& s, int outputs, int vectors, const Vector* g, size_t stride, const Vector* x, Vector* sums) {
    with_width(s, [&](auto width) {
        for (int t = 0; t < outputs; ++t) {
            const Vector* of = g + t * stride;
            if constexpr (width > 0) tap_gradient_map<width>(s, vectors, of, x, sums + t * s.taps());
            else tap_gradient_frame(s, vectors, of, x, sums + t * s.taps());
        }
    });
}
