// The transposition of a block of a matrix, by tiles of 4x4 in registers.
#pragma once
#include "vector.h"

INLINE void transpose_quads(const float* from, size_t from_stride, float* to, size_t to_stride) {
    Quad row[4];
    UNROLL for (int i = 0; i < 4; ++i) row[i] = *(const UnalignedQuad*)(from + i * from_stride);
    const Quad a = SHUFFLE(row[0], row[1], 0, 4, 1, 5), b = SHUFFLE(row[2], row[3], 0, 4, 1, 5);
    const Quad c = SHUFFLE(row[0], row[1], 2, 6, 3, 7), d = SHUFFLE(row[2], row[3], 2, 6, 3, 7);
    *(UnalignedQuad*)to = SHUFFLE(a, b, 0, 1, 4, 5);
    *(UnalignedQuad*)(to + to_stride) = SHUFFLE(a, b, 2, 3, 6, 7);
    *(UnalignedQuad*)(to + 2 * to_stride) = SHUFFLE(c, d, 0, 1, 4, 5);
    *(UnalignedQuad*)(to + 3 * to_stride) = SHUFFLE(c, d, 2, 3, 6, 7);
}

// from [rows][columns] -> to [columns][rows], whose rows lie so far apart.
INLINE void transpose_block(const float* from, size_t from_stride, float* to, size_t to_stride, int rows, int columns) {
    int i = 0;
    for (; i + 4 <= rows; i += 4, from += 4 * from_stride, to += 4) {
        int j = 0;
        for (; j + 4 <= columns; j += 4) transpose_quads(from + j, from_stride, to + j * to_stride, to_stride);
        for (; j < columns; ++j)
            for (int r = 0; r < 4; ++r) to[j * to_stride + r] = from[r * from_stride + j];
    }
    for (; i < rows; ++i, from += from_stride, ++to)
        for (int j = 0; j < columns; ++j) to[j * to_stride] = from[j];
}
