#include "product.h"

void pack(const float* a, int rows, int inner, int row_stride, int inner_stride, float* packed) {
    for (int first = 0; first < rows; first += TILE_ROWS)
        for (int k = 0; k < inner; ++k)
            for (int r = first; r < first + TILE_ROWS; ++r)
                *packed++ = r < rows ? a[(size_t)r * row_stride + (size_t)k * inner_stride] : 0.f;
}

namespace {

template <int COLUMNS>
INLINE void multiply_columns(const float* a, int rows, int inner, const Vector* b, size_t stride, Vector* out, size_t out_stride) {
    for (int row = 0; row < rows; row += TILE_ROWS) {
        Vector tile[TILE_ROWS][COLUMNS] = {};
        const Vector* from = b;
        for (int k = 0; k < inner; ++k, a += TILE_ROWS, from += stride) {
            Vector x[COLUMNS];
            UNROLL for (int c = 0; c < COLUMNS; ++c) x[c] = from[c];
            // The first tile of rows brings the next columns near.
            if (row == 0) {
                __builtin_prefetch(from + COLUMNS);
                __builtin_prefetch((const char*)(from + 2 * COLUMNS) - 1);
            }
            UNROLL for (int r = 0; r < TILE_ROWS; ++r)
                UNROLL for (int c = 0; c < COLUMNS; ++c) tile[r][c] += x[c] * a[r];
        }
        UNROLL for (int r = 0; r < TILE_ROWS; ++r)
            if (row + r < rows) UNROLL for (int c = 0; c < COLUMNS; ++c) out[(row + r) * out_stride + c] = tile[r][c];
    }
}

}  // namespace

void multiply(const float* a, int rows, int inner, const Vector* b, size_t stride, int columns, Vector* out, size_t out_stride) {
    static_assert(TILE_COLUMNS == 3);
    for (; columns >= 3; columns -= 3, b += 3, out += 3) multiply_columns<3>(a, rows, inner, b, stride, out, out_stride);
    if (columns == 2) multiply_columns<2>(a, rows, inner, b, stride, out, out_stride);
    if (columns == 1) multiply_columns<1>(a, rows, inner, b, stride, out, out_stride);
}

void add_outer(const Vector* a, size_t a_stride, int rows, const Vector* b, size_t b_stride, int columns, int length, float* total) {
    constexpr int R = MANY_REGISTERS ? 4 : 3, C = 4;
    for (int column = 0; column < columns; column += C)
        for (int row = 0; row < rows; row += R) {
            // Beyond the edge the last row or column is repeated, and not added.
            const Vector *x[R], *y[C];
            UNROLL for (int r = 0; r < R; ++r) x[r] = a + (row + r < rows ? row + r : rows - 1) * a_stride;
            UNROLL for (int c = 0; c < C; ++c) y[c] = b + (column + c < columns ? column + c : columns - 1) * b_stride;
            Vector tile[R][C] = {};
            for (int k = 0; k < length; ++k) {
                // With the fewer operands in registers, and of the others one at a time, 16 registers suffice.
                Vector v[R];
                UNROLL for (int r = 0; r < R; ++r) v[r] = x[r][k];
                UNROLL for (int c = 0; c < C; ++c) {
                    const Vector w = y[c][k];
                    UNROLL for (int r = 0; r < R; ++r) tile[r][c] += v[r] * w;
                }
            }
            UNROLL for (int r = 0; r < R; ++r) {
                if (row + r >= rows) break;
                const Quad found = sums(tile[r][0], tile[r][1], tile[r][2], tile[r][3]);
                float* to = total + (size_t)(row + r) * columns + column;
                if (column + C <= columns) *(UnalignedQuad*)to += found;
                else for (int c = 0; column + c < columns; ++c) to[c] += found[c];
            }
        }
}
