// Matrix products whose columns are vectors: [rows][inner] numbers times [inner][columns] vectors.
#pragma once
#include "vector.h"

// A tile of the product, whose sums stay in registers while the inner dimension is run through.
constexpr int TILE_ROWS = MANY_REGISTERS ? 8 : 4;
constexpr int TILE_COLUMNS = 3;

INLINE size_t packed_size(int rows, int inner) {
    return (size_t)((rows + TILE_ROWS - 1) / TILE_ROWS) * TILE_ROWS * inner;
}

// Rearrange a matrix to [tile][inner][row of the tile], the order in which `multiply` reads it; zeros fill the last tile.
void pack(const float* a, int rows, int inner, int row_stride, int inner_stride, float* packed);

// out [rows][columns] = packed a [rows][inner] times b [inner][columns], whose rows lie so many vectors apart.
void multiply(const float* a, int rows, int inner, const Vector* b, size_t stride, int columns, Vector* out, size_t out_stride);

// sums [rows][columns] += a [rows][length] b [columns][length]^T, over the lanes too; rows lie `stride` vectors apart.
void add_outer(const Vector* a, size_t a_stride, int rows, const Vector* b, size_t b_stride, int columns, int length, float* total);
