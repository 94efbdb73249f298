// The block y = x + V gelu(W norm(depthwise(x)) + b) + c, and its gradients, on chunks of images.
//
// The norm folds into the product: with m a channel's mean over an image's pixels, hc = h - m, and M the norm's mean,
// W (h - M) / sd = (W hc + W (m - M)) / sd. So the wide maps h are written once, less their means, while they lie in
// the nearest cache, and the norm's own statistics, which are complete only after all images, cost no pass over them.
// Every row of h, of the product and of its gradient has one pixel more than the map: m - M, and what comes of it.
#include "depthwise.h"
#include "gelu.h"
#include "product.h"

struct Block {
    int images, channels, outputs, hidden;  // N, C, K, O
    int height, width, kernel_height, kernel_width;
    int vectors, slots;
    int over_sample, tanh;
    double eps;
    // Maps are [channels][pixels][images].
    const float *x, *taps, *shift;      // taps [K][kernel], shift [K] or null
    const float *w, *bias;              // [O][K], [O] or null
    const float *projection, *offset;   // [C][O], [C] or null
    float* y;
    // For the backward: h less its means [chunks][K][stride], its product [chunks][O][stride], and each image's scale
    // [chunks][lanes]. All null in a forward without one.
    Vector *h, *product;
    float* scale;
    void* workspace;
    const float* gy;
    float *gx, *gtaps, *gshift, *gw, *gbias, *gprojection, *goffset;  // null: not needed
    double* shared;  // see `Ranks`
    Exchange* exchange;
};

namespace {

struct Sizes : Depthwise {
    int hidden;

    explicit Sizes(const Block& k) : Depthwise(k), hidden(k.hidden) {}
};

struct ForwardWork {
    float *w, *projection;  // packed
    Statistics statistics;
    Vector *means, *product;  // [chunks][K][vectors], [chunks][O][stride]

    ForwardWork(const Sizes& s, Arena& arena)
        : w(arena.take<float>(packed_size(s.hidden, s.outputs))),
          projection(arena.take<float>(packed_size(s.channels, s.hidden))),
          statistics{arena.take<double>(s.lanes()), arena.take<double>(s.lanes()), arena.take<float>(s.lanes())},
          means(arena.take<Vector>((size_t)s.chunks.count() * s.outputs * s.chunks.vectors)),
          product(arena.take<Vector>(s.stride * s.hidden * s.chunks.count())) {}
};

// Of each slot.
struct ForwardScratch {
    ConvolutionScratch convolution;
    Vector *h, *activation;  // [K][stride], [O][stride]

    ForwardScratch(const Sizes& s, Arena& arena)
        : convolution(s, arena),
          h(arena.take<Vector>(s.outputs * s.stride)),
          activation(arena.take<Vector>(s.hidden * s.stride)) {}
};

template <bool TANH> void activate(const Vector* product, int pixels, Vector scale, Vector shift, Vector* activation) {
    for (int p = 0; p < pixels; ++p) activation[p] = gelu<TANH>(product[p] * scale + shift).value;
}

void forward(const Block& k) {
    const Sizes s(k);
    const int B = s.chunks.vectors, C = s.channels, K = s.outputs, O = s.hidden;
    Arena arena{(char*)k.workspace};
    const ForwardWork work(s, arena);
    const bool keeps = k.h;
    Vector* products = keeps ? k.product : work.product;
    Statistics statistics = work.statistics;
    if (keeps) statistics.scale = k.scale;
    char* const scratches = arena.rest();
    pack(k.w, O, K, K, 1, work.w);
    pack(k.projection, C, O, O, 1, work.projection);

    in_chunks<ForwardScratch>(s, scratches, [&](int, int chunk, const ForwardScratch& scratch) {
        Vector* h = keeps ? k.h + s.stride * K * chunk : scratch.h;
        convolve_chunk(s, chunk, h, work.means + (size_t)chunk * K * B, scratch.convolution, statistics);
        Vector* product = products + s.stride * O * chunk;
        multiply(work.w, O, K, h, s.stride, s.columns, product, s.stride);
    });
    statistics.finish(s.chunks, s.count(), k.over_sample, k.eps, s.ranks);

    in_chunks<ForwardScratch>(s, scratches, [&](int, int chunk, const ForwardScratch& scratch) {
        Vector* h = keeps ? k.h + s.stride * K * chunk : scratch.h;
        deviations_of_means(s, chunk, work.means + (size_t)chunk * K * B, statistics, h);
        Vector* product = products + s.stride * O * chunk;
        multiply(work.w, O, K, h + s.columns, s.stride, B, product + s.columns, s.stride);
        for (int o = 0; o < O; ++o) {
            const Vector* row = product + o * s.stride;
            for (int b = 0; b < B; ++b) {
                const Vector scale = load(statistics.scale + s.chunks.first(chunk) + b * LANES);
                const Vector shift = row[s.columns + b] * scale + (k.bias ? k.bias[o] : 0.f);
                auto function = k.tanh ? activate<true> : activate<false>;
                function(row + b * s.pixels, s.pixels, scale, shift, scratch.activation + o * s.stride + b * s.pixels);
            }
        }
        // h of this chunk is no longer needed here.
        Vector* branch = scratch.h;
        multiply(work.projection, C, O, scratch.activation, s.stride, s.columns, branch, s.stride);
        for (int c = 0; c < C; ++c) {
            const float offset = k.offset ? k.offset[c] : 0.f;
            for (int b = 0; b < B; ++b) {
                Vector* map = branch + c * s.stride + b * s.pixels;
                const int first = s.chunks.first(chunk) + b * LANES;
                read_images(s.channel(k.x, c), s.pixels, k.images, first, [=](int p, Vector x) INLINE_LAMBDA { map[p] += x + offset; });
                write_images(s.channel(k.y, c), s.pixels, k.images, first, [=](int p) INLINE_LAMBDA { return map[p]; });
            }
        }
    });
}

struct BackwardWork {
    float *w, *projection, *w_sums;  // of the transposed matrices, packed; [O]
    double *g_sums, *slopes;         // [lanes]: sums over an image of dL/dx^ and of its product with x^, both scaled
    Vector* gz;                      // [chunks][O][stride]: gradients of the product, scaled

    BackwardWork(const Sizes& s, Arena& arena)
        : w(arena.take<float>((size_t)s.channels * packed_size(s.multiplier, s.hidden) + packed_size(s.outputs, s.hidden))),
          projection(arena.take<float>(packed_size(s.hidden, s.channels))),
          w_sums(arena.take<float>(s.hidden)),
          g_sums(arena.take<double>(s.lanes())),
          slopes(arena.take<double>(s.lanes())),
          gz(arena.take<Vector>(s.stride * s.hidden * s.chunks.count())) {}
};

// Gradients of parameters, summed over a slot's chunks; those of taps with their lanes.
struct Partial {
    Vector* taps;                                     // [K][kernel]
    float *shift, *w, *bias, *projection, *offset;

    Partial(const Sizes& s, Arena& arena)
        : taps(arena.take<Vector>((size_t)s.outputs * s.stencil.taps())),
          shift(arena.take<float>(s.outputs)),
          w(arena.take<float>((size_t)s.hidden * s.outputs)),
          bias(arena.take<float>(s.hidden)),
          projection(arena.take<float>((size_t)s.channels * s.hidden)),
          offset(arena.take<float>(s.channels)) {}
};

// Rows of h whose gradients are computed at once, while they lie in the nearest cache: whole channels.
int channels_at_once(const Sizes& s) { return s.multiplier >= 8 ? 1 : 8 / s.multiplier; }

struct BackwardScratch {
    Vector *gy, *activation, *gh;  // [C][stride], [O][stride], [rows][stride]
    GradientScratch gradients;

    BackwardScratch(const Sizes& s, Arena& arena)
        : gy(arena.take<Vector>(s.channels * s.stride)),
          activation(arena.take<Vector>(s.hidden * s.stride)),
          gh(arena.take<Vector>(channels_at_once(s) * s.multiplier * s.stride)),
          gradients(s, arena) {}
};

// From the gradient of the activation, in gz, to the scaled one of the product; and the activation. Returns sums over
// the pixels: of gz before it is scaled, after it, and then times the centred product.
struct Sums {
    Vector g, scaled, slope;
};
template <bool TANH>
Sums activate_backward(const Vector* product, int pixels, Vector deviation, Vector scale, float bias, Vector* activation, Vector* gz) {
    Sums sums = {};
    for (int p = 0; p < pixels; ++p) {
        const Vector centred = product[p] + deviation;
        const Vector z = centred * scale + bias;
        const Gelu of_z = gelu<TANH>(z);
        activation[p] = of_z.value;
        const Vector g = gz[p] * of_z.derivative, scaled = g * scale;
        gz[p] = scaled;
        sums.g += g;
        sums.scaled += scaled;
        sums.slope += scaled * centred;
    }
    return sums;
}

void backward_of_product(const Block& k, const Sizes& s, int chunk, const BackwardWork& work, const BackwardScratch& scratch, const Partial& partial) {
    const int B = s.chunks.vectors, C = s.channels, K = s.outputs, O = s.hidden, P = s.pixels;
    for (int c = 0; c < C; ++c) {
        Vector total = {};
        for (int b = 0; b < B; ++b) {
            Vector* gy = scratch.gy + c * s.stride + b * P;
            read_images(s.channel(k.gy, c), P, k.images, s.chunks.first(chunk) + b * LANES, [&](int p, Vector x) INLINE_LAMBDA {
                gy[p] = x;
                total += x;
            });
        }
        partial.offset[c] += sum(total);
    }
    Vector* gz = work.gz + s.stride * O * chunk;
    multiply(work.projection, O, C, scratch.gy, s.stride, s.columns, gz, s.stride);
    const Vector* product = k.product + s.stride * O * chunk;
    for (int b = 0; b < B; ++b) {
        const size_t lane = s.chunks.first(chunk) + b * LANES;
        const Vector scale = load(k.scale + lane);
        Doubles g_sum = {}, slope = {};
        for (int o = 0; o < O; ++o) {
            const size_t row = o * s.stride, map = row + b * P, beyond = row + s.columns + b;
            auto function = k.tanh ? activate_backward<true> : activate_backward<false>;
            const Sums sums = function(product + map, P, product[beyond], scale, k.bias ? k.bias[o] : 0.f, scratch.activation + map, gz + map);
            gz[beyond] = sums.scaled;
            partial.bias[o] += sum(sums.g);
            // Sums over the K channels of the gradient of x^, taken on the narrow side of W.
            g_sum += widen(sums.scaled) * (double)work.w_sums[o];
            slope += widen(sums.slope);
        }
        store(work.g_sums + lane, g_sum);
        store(work.slopes + lane, slope);
    }
    if (k.gprojection)
        add_outer(scratch.gy, s.stride, C, scratch.activation, s.stride, O, s.columns, partial.projection);
    if (k.gw)
        add_outer(gz, s.stride, O, k.h + s.stride * K * chunk, s.stride, K, s.columns + B, partial.w);
}

// dL/dh = W^T gz + level + slope x^, whose level and slope are those of each image.
void backward_of_convolution(const Block& k, const Sizes& s, int chunk, const BackwardWork& work, const BackwardScratch& scratch, const Partial& partial) {
    const int B = s.chunks.vectors, C = s.channels, K = s.outputs, O = s.hidden, P = s.pixels, M = s.multiplier;
    const int at_once = channels_at_once(s), first = s.chunks.first(chunk);
    Vector scale[MOST_VECTORS], level[MOST_VECTORS], slope[MOST_VECTORS];
    for (int b = 0; b < B; ++b) {
        scale[b] = load(k.scale + first + b * LANES);
        level[b] = narrow(load(work.g_sums + first + b * LANES));
        slope[b] = narrow(load(work.slopes + first + b * LANES));
    }
    const float* w = work.w;
    for (int c = 0; c < C; c += at_once) {
        const int channels = c + at_once < C ? at_once : C - c, rows = channels * M;
        const Vector* h = k.h + s.stride * K * chunk + s.stride * M * c;
        Vector* gh = scratch.gh;
        multiply(w, rows, O, work.gz + s.stride * O * chunk, s.stride, s.columns, gh, s.stride);
        w += packed_size(rows, O);
        for (int row = 0; row < rows; ++row) {
            Vector total = {};
            for (int b = 0; b < B; ++b) {
                Vector* g = gh + row * s.stride + b * P;
                const Vector* of = h + row * s.stride + b * P;
                const Vector constant = level[b] + slope[b] * (h[row * s.stride + s.columns + b] * scale[b]);
                for (int p = 0; p < P; ++p) {
                    g[p] += constant + slope[b] * (of[p] * scale[b]);
                    total += g[p];
                }
            }
            partial.shift[c * M + row] += sum(total);
        }
        for (int i = c; i < c + channels; ++i) {
            Vector* taps = k.gtaps ? partial.taps + (size_t)i * M * s.stencil.taps() : nullptr;
            gradients_of_channel(s, chunk, i, gh + (i - c) * M * s.stride, scratch.gradients, taps, k.gy, k.gx);
        }
    }
}

void backward(const Block& k) {
    const Sizes s(k);
    const int C = s.channels, K = s.outputs, O = s.hidden, at_once = channels_at_once(s);
    Arena arena{(char*)k.workspace};
    const BackwardWork work(s, arena);
    const size_t partial_size = size_of<Partial>(s);
    char *const partials = arena.rest(), *const scratches = partials + k.slots * partial_size;
    float* w = work.w;
    for (int c = 0; c < C; c += at_once) {
        const int rows = (c + at_once < C ? at_once : C - c) * s.multiplier;
        pack(k.w + c * s.multiplier, rows, O, 1, K, w);
        w += packed_size(rows, O);
    }
    pack(k.projection, O, C, 1, O, work.projection);
    for (int o = 0; o < O; ++o) {
        double total = 0;
        for (int i = 0; i < K; ++i) total += k.w[(size_t)o * K + i];
        work.w_sums[o] = (float)total;
    }

    in_parallel(k.slots, [&](int slot) { memset(partials + slot * partial_size, 0, partial_size); });
    auto partial = [&](int slot) {
        Arena sums{partials + slot * partial_size};
        return Partial(s, sums);
    };
    in_chunks<BackwardScratch>(s, scratches, [&](int slot, int chunk, const BackwardScratch& scratch) {
        backward_of_product(k, s, chunk, work, scratch, partial(slot));
    });
    finish_gradient(s.chunks, s.count(), s.over_sample, s.ranks, k.scale, work.g_sums, work.slopes);
    if (k.gx || k.gtaps || k.gshift)
        in_chunks<BackwardScratch>(s, scratches, [&](int slot, int chunk, const BackwardScratch& scratch) {
            backward_of_convolution(k, s, chunk, work, scratch, partial(slot));
        });

    auto reduce = [&](float* to, size_t length, auto part) {
        sum_slots(k.slots, to, length, [&](int slot, int i) { return part(partial(slot), i); });
    };
    reduce(k.gtaps, (size_t)K * s.stencil.taps(), [](const Partial& p, int i) { return sum(p.taps[i]); });
    reduce(k.gshift, K, [](const Partial& p, int i) { return p.shift[i]; });
    reduce(k.gw, (size_t)O * K, [](const Partial& p, int i) { return p.w[i]; });
    reduce(k.gbias, O, [](const Partial& p, int i) { return p.bias[i]; });
    reduce(k.gprojection, (size_t)C * O, [](const Partial& p, int i) { return p.projection[i]; });
    reduce(k.goffset, C, [](const Partial& p, int i) { return p.offset[i]; });
}

}  // namespace

extern "C" {
EXPORT void fastconv_block_forward(const Block* k) { forward(*k); }
EXPORT void fastconv_block_backward(const Block* k) { backward(*k); }
// Bytes of the workspace.
EXPORT size_t fastconv_block_forward_workspace(const Block* k) {
    const Sizes s(*k);
    return size_of<ForwardWork>(s) + k->slots * size_of<ForwardScratch>(s);
}
EXPORT size_t fastconv_block_backward_workspace(const Block* k) {
    const Sizes s(*k);
    return size_of<BackwardWork>(s) + k->slots * (size_of<BackwardScratch>(s) + size_of<Partial>(s));
}
}
