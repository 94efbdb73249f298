// Depthwise convolution and layer norm, y = norm(depthwise(x)), and its gradients, on chunks of images.
//
// The first pass keeps the convolution's maps h, less their means, and each image's statistics; the second writes y.
// The backward, too, takes the norm's sums first, and then both gradients, channel by channel.
#include "depthwise.h"
#include "transpose.h"

struct DepthwiseLayerNorm {
    int images, channels, outputs;  // N, C, K
    int height, width, kernel_height, kernel_width;
    int vectors, slots;
    int over_sample;
    int contiguous;  // whether y and gy lie [images][K][pixels]
    double eps;
    // Other maps are [channels][pixels][images].
    const float *x, *taps, *shift;  // taps [K][kernel], shift [K] or null
    float* y;
    // For the backward: h less its means [chunks][K][stride], and each image's scale [chunks][lanes].
    Vector* h;
    float* scale;
    void* workspace;
    const float* gy;
    float *gx, *gtaps, *gshift;  // null: not needed
    double* shared;  // see `Ranks`
    Exchange* exchange;
};

namespace {

// The results' map of output `row`, for the vector of images from `first` on.
struct Results {
    const Depthwise& d;
    bool contiguous;

    // Images of the vector.
    int there(int first) const { return d.chunks.images - first < LANES ? d.chunks.images - first : LANES; }
    size_t offset(int row, int first) const { return ((size_t)first * d.outputs + row) * d.pixels; }
    void read(const float* maps, int row, int first, Vector* map) const {
        if (!contiguous)
            return read_images(d.channel(maps, row), d.pixels, d.chunks.images, first, [=](int p, Vector x) INLINE_LAMBDA { map[p] = x; });
        if (there(first) < LANES) memset((void*)map, 0, d.pixels * sizeof(Vector));
        transpose_block(maps + offset(row, first), (size_t)d.outputs * d.pixels, (float*)map, LANES, there(first), d.pixels);
    }
    void write(float* maps, int row, int first, const Vector* map) const {
        if (!contiguous)
            return write_images(d.channel(maps, row), d.pixels, d.chunks.images, first, [=](int p) INLINE_LAMBDA { return map[p]; });
        transpose_block((const float*)map, LANES, maps + offset(row, first), (size_t)d.outputs * d.pixels, d.pixels, there(first));
    }
};

struct ForwardWork {
    Statistics statistics;
    Vector* means;  // [chunks][K][vectors]

    ForwardWork(const Depthwise& d, Arena& arena)
        : statistics{arena.take<double>(d.lanes()), arena.take<double>(d.lanes()), nullptr},
          means(arena.take<Vector>((size_t)d.chunks.count() * d.outputs * d.chunks.vectors)) {}
};

// Each slot has its own.
struct ForwardScratch {
    ConvolutionScratch convolution;
    Vector* map;

    ForwardScratch(const Depthwise& d, Arena& arena) : convolution(d, arena), map(arena.take<Vector>(d.pixels)) {}
};

void forward(const DepthwiseLayerNorm& k) {
    const Depthwise d(k);
    const Results results{d, (bool)k.contiguous};
    const int K = d.outputs, P = d.pixels;
    Arena arena{(char*)k.workspace};
    const ForwardWork work(d, arena);
    Statistics statistics = work.statistics;
    statistics.scale = k.scale;
    char* const scratches = arena.rest();
    in_chunks<ForwardScratch>(d, scratches, [&](int, int chunk, const ForwardScratch& scratch) {
        Vector* means = work.means + (size_t)chunk * K * d.chunks.vectors;
        convolve_chunk(d, chunk, k.h + d.stride * K * chunk, means, scratch.convolution, statistics);
    });
    statistics.finish(d.chunks, d.count(), d.over_sample, k.eps, d.ranks);
    in_chunks<ForwardScratch>(d, scratches, [&](int, int chunk, const ForwardScratch& scratch) {
        Vector* h = k.h + d.stride * K * chunk;
        deviations_of_means(d, chunk, work.means + (size_t)chunk * K * d.chunks.vectors, statistics, h);
        for (int row = 0; row < K; ++row)
            for (int b = 0; b < d.chunks.vectors; ++b) {
                const int first = d.chunks.first(chunk) + b * LANES;
                const Vector scale = load(k.scale + first);
                const Vector *of = h + row * d.stride, deviation = of[d.columns + b];
                for (int p = 0; p < P; ++p) scratch.map[p] = (of[b * P + p] + deviation) * scale;
                results.write(k.y, row, first, scratch.map);
            }
    });
}

struct BackwardWork {
    double *levels, *slopes;  // [lanes]: of `finish_gradient`

    BackwardWork(const Depthwise& d, Arena& arena)
        : levels(arena.take<double>(d.lanes())), slopes(arena.take<double>(d.lanes())) {}
};

// Gradients of parameters, summed over a slot's chunks; those of taps with their lanes.
struct Partial {
    Vector* taps;  // [K][kernel]
    float* shift;

    Partial(const Depthwise& d, Arena& arena)
        : taps(arena.take<Vector>((size_t)d.outputs * d.stencil.taps())), shift(arena.take<float>(d.outputs)) {}
};

struct BackwardScratch {
    Vector* gh;  // [M][stride]
    GradientScratch gradients;

    BackwardScratch(const Depthwise& d, Arena& arena) : gh(arena.take<Vector>(d.multiplier * d.stride)), gradients(d, arena) {}
};

void add_up(const DepthwiseLayerNorm& k, const Depthwise& d, int chunk, const BackwardWork& work, const BackwardScratch& scratch) {
    const Results results{d, (bool)k.contiguous};
    const Vector* h = k.h + d.stride * d.outputs * chunk;
    Doubles levels[MOST_VECTORS] = {}, slopes[MOST_VECTORS] = {};
    for (int row = 0; row < d.outputs; ++row)
        for (int b = 0; b < d.chunks.vectors; ++b) {
            const int first = d.chunks.first(chunk) + b * LANES;
            const Vector scale = load(k.scale + first);
            results.read(k.gy, row, first, scratch.gh);
            const Vector *of = h + row * d.stride, deviation = of[d.columns + b];
            Vector sum = {}, product = {};
            for (int p = 0; p < d.pixels; ++p) {
                const Vector g = scratch.gh[p] * scale;
                sum += g;
                product += g * (of[b * d.pixels + p] + deviation);
            }
            levels[b] += widen(sum);
            slopes[b] += widen(product);
        }
    for (int b = 0; b < d.chunks.vectors; ++b) {
        store(work.levels + d.chunks.first(chunk) + b * LANES, levels[b]);
        store(work.slopes + d.chunks.first(chunk) + b * LANES, slopes[b]);
    }
}

void gradients(const DepthwiseLayerNorm& k, const Depthwise& d, int chunk, const BackwardWork& work, const BackwardScratch& scratch, const Partial& partial) {
    const Results results{d, (bool)k.contiguous};
    const int M = d.multiplier, P = d.pixels;
    for (int c = 0; c < d.channels; ++c) {
        for (int b = 0; b < d.chunks.vectors; ++b) {
            const int first = d.chunks.first(chunk) + b * LANES;
            const Vector scale = load(k.scale + first), level = narrow(load(work.levels + first));
            const Vector slope = narrow(load(work.slopes + first));
            for (int t = 0; t < M; ++t) {
                const int row = c * M + t;
                Vector* g = scratch.gh + t * d.stride + b * P;
                results.read(k.gy, row, first, g);
                const Vector *of = k.h + d.stride * d.outputs * chunk + d.stride * row, deviation = of[d.columns + b];
                Vector total = {};
                for (int p = 0; p < P; ++p) {
                    g[p] = g[p] * scale + (level + slope * ((of[b * P + p] + deviation) * scale));
                    total += g[p];
                }
                partial.shift[row] += sum(total);
            }
        }
        Vector* taps = k.gtaps ? partial.taps + (size_t)c * M * d.stencil.taps() : nullptr;
        gradients_of_channel(d, chunk, c, scratch.gh, scratch.gradients, taps, nullptr, k.gx);
    }
}

void backward(const DepthwiseLayerNorm& k) {
    const Depthwise d(k);
    Arena arena{(char*)k.workspace};
    const BackwardWork work(d, arena);
    const size_t partial_size = size_of<Partial>(d);
    char *const partials = arena.rest(), *const scratches = partials + k.slots * partial_size;
    in_parallel(k.slots, [&](int slot) { memset(partials + slot * partial_size, 0, partial_size); });
    auto partial = [&](int slot) {
        Arena sums{partials + slot * partial_size};
        return Partial(d, sums);
    };
    in_chunks<BackwardScratch>(d, scratches, [&](int, int chunk, const BackwardScratch& scratch) {
        add_up(k, d, chunk, work, scratch);
    });
    finish_gradient(d.chunks, d.count(), d.over_sample, d.ranks, k.scale, work.levels, work.slopes);
    in_chunks<BackwardScratch>(d, scratches, [&](int slot, int chunk, const BackwardScratch& scratch) {
        gradients(k, d, chunk, work, scratch, partial(slot));
    });
    const size_t taps = (size_t)d.outputs * d.stencil.taps();
    sum_slots(k.slots, k.gtaps, taps, [&](int slot, int i) { return sum(partial(slot).taps[i]); });
    sum_slots(k.slots, k.gshift, d.outputs, [&](int slot, int i) { return partial(slot).shift[i]; });
}

}  // namespace

extern "C" {
EXPORT void fastconv_depthwise_forward(const DepthwiseLayerNorm* k) { forward(*k); }
EXPORT void fastconv_depthwise_backward(const DepthwiseLayerNorm* k) { backward(*k); }
EXPORT size_t fastconv_depthwise_forward_workspace(const DepthwiseLayerNorm* k) {
    const Depthwise d(*k);
    return size_of<ForwardWork>(d) + k->slots * size_of<ForwardScratch>(d);
}
EXPORT size_t fastconv_depthwise_backward_workspace(const DepthwiseLayerNorm* k) {
    const Depthwise d(*k);
    return size_of<BackwardWork>(d) + k->slots * (size_of<BackwardScratch>(d) + size_of<Partial>(d));
}
}
