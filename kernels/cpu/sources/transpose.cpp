// The transposition of a matrix, which leads from contiguous maps, a matrix [images][values], to those whose images lie
// side by side, [values][images], and back.
#include "team.h"
#include "vector.h"

struct Transposition {
    int rows, columns, slots;
    const float* from;  // [rows][columns]
    float* to;          // [columns][rows]
};

namespace {

// A line of cache is read from each row at once, and a block's lines that are written stay in the nearest cache.
constexpr int BLOCK_COLUMNS = 16, BLOCK_ROWS = 64;

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

void transpose_block(const float* from, size_t from_stride, float* to, size_t to_stride, int rows, int columns) {
    int i = 0;
    for (; i + 4 <= rows; i += 4, from += 4 * from_stride, to += 4) {
        int j = 0;
        if (columns == BLOCK_COLUMNS)
            UNROLL for (; j < BLOCK_COLUMNS; j += 4) transpose_quads(from + j, from_stride, to + j * to_stride, to_stride);
        for (; j + 4 <= columns; j += 4) transpose_quads(from + j, from_stride, to + j * to_stride, to_stride);
        for (; j < columns; ++j)
            for (int r = 0; r < 4; ++r) to[j * to_stride + r] = from[r * from_stride + j];
    }
    for (; i < rows; ++i, from += from_stride, ++to)
        for (int j = 0; j < columns; ++j) to[j * to_stride] = from[j];
}

INLINE int least(int a, int b) { return a < b ? a : b; }

void transpose(const Transposition& k) {
    const size_t rows = k.rows, columns = k.columns;
    const int across = parts(k.columns, BLOCK_COLUMNS);
    in_parallel(k.slots, [&](int slot) {
        const Slice slice((long)parts(k.rows, BLOCK_ROWS) * across, k.slots, slot);
        for (int block = slice.begin; block < slice.end; ++block) {
            const int row = block / across * BLOCK_ROWS, column = block % across * BLOCK_COLUMNS;
            transpose_block(k.from + row * columns + column, columns, k.to + column * rows + row, rows, least(BLOCK_ROWS, k.rows - row), least(BLOCK_COLUMNS, k.columns - column));
        }
    });
}

}  // namespace

extern "C" {
EXPORT void fastconv_transpose(const Transposition* k) { transpose(*k); }
}
