// The transposition of a matrix, which leads from contiguous maps, a matrix [images][values], to those whose images lie
// side by side, [values][images], and back.
#include "transpose.h"
#include "team.h"

struct Transposition {
    int rows, columns, slots;
    const float* x;  // [rows][columns]
    float* y;        // [columns][rows]
};

namespace {

// A line of cache is read from each row at once, and a block's lines that are written stay in the nearest cache.
constexpr int BLOCK_COLUMNS = 16, BLOCK_ROWS = 64;

INLINE int least(int a, int b) { return a < b ? a : b; }

void transpose(const Transposition& k) {
    const size_t rows = k.rows, columns = k.columns;
    const int across = parts(k.columns, BLOCK_COLUMNS);
    in_parallel(k.slots, [&](int slot) {
        const Slice slice((long)parts(k.rows, BLOCK_ROWS) * across, k.slots, slot);
        for (int block = slice.begin; block < slice.end; ++block) {
            const int row = block / across * BLOCK_ROWS, column = block % across * BLOCK_COLUMNS;
            transpose_block(k.x + row * columns + column, columns, k.y + column * rows + row, rows, least(BLOCK_ROWS, k.rows - row), least(BLOCK_COLUMNS, k.columns - column));
        }
    });
}

}  // namespace

extern "C" {
EXPORT void fastconv_transpose(const Transposition* k) { transpose(*k); }
}
