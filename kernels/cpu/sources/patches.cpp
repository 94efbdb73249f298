// The convolution of patches that do not overlap, y = W x + b or gelu(W x + b), and its gradients; a pointwise
// convolution is the one of patches of one pixel. It is a product of W with a matrix that has a row for each element of
// a patch and a column for each patch, which is copied and multiplied strip by strip.
#include "chunks.h"
#include "gelu.h"
#include "product.h"
#include "team.h"

enum Activation { IDENTITY, GELU_OF_ERF, GELU_OF_TANH };

struct Patches {
    // Maps x [groups][inputs][height][width][length]. Lanes run along the last dimension: images, or pixels.
    int groups, inputs, outputs, height, width, length;
    int patch_height, patch_width;
    int activation, slots;
    const float *x, *w, *bias;  // w [outputs][inputs][patch_height][patch_width], [outputs] or null
    float *y, *z;               // [groups][outputs][height / patch_height][width / patch_width][length]; z, before GELU, or null
    void* workspace;
    const float* gy;
    float *gx, *gw, *gbias;  // gx, or both of the others, may be null: not needed
};

namespace {

// Columns that are multiplied at once, while they lie in a cache of the core. Rows are no power of two apart, which would
// share a set of the cache.
constexpr int STRIP = 8 * TILE_COLUMNS;
constexpr size_t STRIDE = STRIP + 1;

struct Sizes {
    int rows, outputs, high, wide, vectors;
    size_t row_of_y;  // floats from each output to the next
    size_t columns;

    explicit Sizes(const Patches& k)
        : rows(k.inputs * k.patch_height * k.patch_width),
          outputs(k.outputs),
          high(k.height / k.patch_height),
          wide(k.width / k.patch_width),
          vectors((k.length + LANES - 1) / LANES),
          row_of_y((size_t)high * wide * k.length),
          columns((size_t)k.groups * high * wide * vectors) {}
};

// A strip's columns, each a vector: where they lie in x and in y, and how many of their lanes lie there.
struct Columns {
    int count;
    size_t x[STRIP], y[STRIP];
    int lanes[STRIP];
};

struct Scratch {
    Vector *x, *y;  // [rows][STRIDE], [outputs][STRIDE]

    Scratch(const Sizes& s, Arena& arena)
        : x(arena.take<Vector>(s.rows * STRIDE)), y(arena.take<Vector>(s.outputs * STRIDE)) {}
};

// Gradients of the parameters, summed over a slot's strips.
struct Partial {
    float *w, *bias;

    Partial(const Sizes& s, Arena& arena)
        : w(arena.take<float>((size_t)s.outputs * s.rows)), bias(arena.take<float>(s.outputs)) {}
};

// The columns from `first` on, as many as fit a strip and are before `end`.
Columns locate(const Patches& k, const Sizes& s, size_t first, size_t end) {
    Columns columns;
    columns.count = first + STRIP < end ? STRIP : (int)(end - first);
    for (int c = 0; c < columns.count; ++c) {
        const size_t place = (first + c) / s.vectors, lane = (first + c) % s.vectors * LANES;
        const size_t row = place / s.wide, group = row / s.high, i = row % s.high, j = place % s.wide;
        const size_t pixel = (group * k.inputs * k.height + i * k.patch_height) * k.width + j * k.patch_width;
        columns.x[c] = pixel * k.length + lane;
        columns.y[c] = ((group * k.outputs * s.high + i) * s.wide + j) * k.length + lane;
        columns.lanes[c] = k.length - lane < LANES ? (int)(k.length - lane) : LANES;
    }
    return columns;
}

// Call use(row, offset) for each element of a patch, which lies so far from its patch's first.
template <class Use> INLINE void each_row(const Patches& k, Use use) {
    int row = 0;
    for (size_t input = 0; input < (size_t)k.inputs; ++input)
        for (int i = 0; i < k.patch_height; ++i)
            for (int j = 0; j < k.patch_width; ++j) use(row++, ((input * k.height + i) * k.width + j) * k.length);
}

void read_patches(const Patches& k, const Columns& columns, Vector* x) {
    each_row(k, [&](int row, size_t offset) INLINE_LAMBDA {
        Vector* to = x + row * STRIDE;
        for (int c = 0; c < columns.count; ++c) to[c] = load(k.x + offset + columns.x[c], columns.lanes[c]);
    });
}

template <Activation ACTIVATION> INLINE Gelu activate(Vector z) {
    if constexpr (ACTIVATION == IDENTITY) return {z, broadcast(1.f)};
    else return gelu<ACTIVATION == GELU_OF_TANH>(z);
}

// From a row of the product to y, and z if it is kept.
template <Activation ACTIVATION>
void write_row(const Vector* product, const Columns& columns, float bias, float* y, float* z) {
    for (int c = 0; c < columns.count; ++c) {
        const Vector of = product[c] + bias;
        if (z) store(z + columns.y[c], of, columns.lanes[c]);
        store(y + columns.y[c], activate<ACTIVATION>(of).value, columns.lanes[c]);
    }
}

// A row of the gradient of z, and its sum.
template <Activation ACTIVATION>
Vector read_row(const float* gy, const float* z, const Columns& columns, Vector* gz) {
    Vector total = {};
    for (int c = 0; c < columns.count; ++c) {
        Vector g = load(gy + columns.y[c], columns.lanes[c]);
        if constexpr (ACTIVATION != IDENTITY) g *= activate<ACTIVATION>(load(z + columns.y[c], columns.lanes[c])).derivative;
        gz[c] = g;
        total += g;
    }
    return total;
}

// Call use(columns) for each strip of a slot.
template <class Use> void each_strip(const Patches& k, const Sizes& s, int slot, Use use) {
    const Slice slice(s.columns, k.slots, slot);
    for (int first = slice.begin; first < slice.end; first += STRIP) use(locate(k, s, first, slice.end));
}

void forward(const Patches& k) {
    const Sizes s(k);
    Arena arena{(char*)k.workspace};
    float* w = arena.take<float>(packed_size(s.outputs, s.rows));
    pack(k.w, s.outputs, s.rows, s.rows, 1, w);
    const size_t scratch_size = size_of<Scratch>(s);
    char* const scratches = arena.rest();
    auto write = k.activation == IDENTITY ? write_row<IDENTITY> : k.activation == GELU_OF_ERF ? write_row<GELU_OF_ERF> : write_row<GELU_OF_TANH>;

    in_parallel(k.slots, [&](int slot) {
        Arena own{scratches + slot * scratch_size};
        const Scratch scratch(s, own);
        each_strip(k, s, slot, [&](const Columns& columns) {
            read_patches(k, columns, scratch.x);
            multiply(w, s.outputs, s.rows, scratch.x, STRIDE, columns.count, scratch.y, STRIDE);
            for (int o = 0; o < s.outputs; ++o) {
                const size_t row = o * s.row_of_y;
                write(scratch.y + o * STRIDE, columns, k.bias ? k.bias[o] : 0.f, k.y + row, k.z ? k.z + row : nullptr);
            }
        });
    });
}

void backward(const Patches& k) {
    const Sizes s(k);
    Arena arena{(char*)k.workspace};
    float* w = arena.take<float>(packed_size(s.rows, s.outputs));
    pack(k.w, s.rows, s.outputs, 1, s.rows, w);
    const size_t scratch_size = size_of<Scratch>(s), partial_size = size_of<Partial>(s);
    char *const partials = arena.rest(), *const scratches = partials + k.slots * partial_size;
    auto read = k.activation == IDENTITY ? read_row<IDENTITY> : k.activation == GELU_OF_ERF ? read_row<GELU_OF_ERF> : read_row<GELU_OF_TANH>;

    in_parallel(k.slots, [&](int slot) {
        memset(partials + slot * partial_size, 0, partial_size);
        Arena own{scratches + slot * scratch_size}, sums{partials + slot * partial_size};
        const Scratch scratch(s, own);
        const Partial partial(s, sums);
        each_strip(k, s, slot, [&](const Columns& columns) {
            for (int o = 0; o < s.outputs; ++o) {
                const size_t row = o * s.row_of_y;
                partial.bias[o] += sum(read(k.gy + row, k.z ? k.z + row : nullptr, columns, scratch.y + o * STRIDE));
            }
            if (k.gw) {
                read_patches(k, columns, scratch.x);
                add_outer(scratch.y, STRIDE, s.outputs, scratch.x, STRIDE, s.rows, columns.count, partial.w);
            }
            if (k.gx) {
                multiply(w, s.rows, s.outputs, scratch.y, STRIDE, columns.count, scratch.x, STRIDE);
                each_row(k, [&](int row, size_t offset) INLINE_LAMBDA {
                    const Vector* from = scratch.x + row * STRIDE;
                    for (int c = 0; c < columns.count; ++c) store(k.gx + offset + columns.x[c], from[c], columns.lanes[c]);
                });
            }
        });
    });

    auto partial = [&](int slot) {
        Arena sums{partials + slot * partial_size};
        return Partial(s, sums);
    };
    sum_slots(k.slots, k.gw, (size_t)s.outputs * s.rows, [&](int slot, int i) { return partial(slot).w[i]; });
    sum_slots(k.slots, k.gbias, s.outputs, [&](int slot, int i) { return partial(slot).bias[i]; });
}

}  // namespace

extern "C" {
EXPORT void fastconv_patches_forward(const Patches* k) { forward(*k); }
EXPORT void fastconv_patches_backward(const Patches* k) { backward(*k); }
// Bytes of the workspace.
EXPORT size_t fastconv_patches_forward_workspace(const Patches* k) {
    const Sizes s(*k);
    Arena arena{nullptr};
    arena.take<float>(packed_size(s.outputs, s.rows));
    return arena.size + k->slots * size_of<Scratch>(s);
}
EXPORT size_t fastconv_patches_backward_workspace(const Patches* k) {
    const Sizes s(*k);
    Arena arena{nullptr};
    arena.take<float>(packed_size(s.rows, s.outputs));
    return arena.size + k->slots * (size_of<Scratch>(s) + size_of<Partial>(s));
}
}
