// The depthwise convolution of chunks of images, less means and with statistics for a norm; and the norm's and the
// convolution's gradients.
#pragma once
#include "chunks.h"
#include "convolution.h"
#include "norm.h"
#include "team.h"

// Rows of a chunk's wide maps [K][stride] have one pixel more than the map, for what a norm knows only at its end.
struct Depthwise {
    Chunks chunks;
    Stencil stencil;
    int channels, outputs, multiplier, pixels, columns, slots;  // C, K, K / C
    size_t stride;  // of rows, in vectors; first in products with chunks, which are then of 64 bits
    const float *x, *taps, *shift;  // [C][pixels][images], [K][kernel], [K] or null
    bool over_sample;
    Ranks ranks;

    // From the arguments of an operation, which have these names.
    template <class Arguments>
    explicit Depthwise(const Arguments& k)
        : chunks{k.images, k.vectors},
          stencil{k.height, k.width, k.kernel_height, k.kernel_width},
          channels(k.channels),
          outputs(k.outputs),
          multiplier(k.outputs / k.channels),
          pixels(k.height * k.width),
          columns(pixels * k.vectors),
          slots(k.slots),
          stride(columns + k.vectors),
          x(k.x),
          taps(k.taps),
          shift(k.shift),
          over_sample(k.over_sample),
          ranks{k.shared, k.exchange} {}
    size_t lanes() const { return (size_t)chunks.count() * chunks.lanes(); }
    const float* channel(const float* maps, int c) const { return maps + (size_t)c * pixels * chunks.images; }
    float* channel(float* maps, int c) const { return maps + (size_t)c * pixels * chunks.images; }
    // Values of a norm of one image.
    double count() const { return (double)outputs * pixels; }
};

// Call use(slot, chunk, scratch) for each chunk; each slot has a scratch of its own, one after the other in `scratches`.
template <class Scratch, class Sizes, class Use> void in_chunks(const Sizes& s, char* scratches, Use use) {
    const size_t size = size_of<Scratch>(s);
    in_parallel(s.slots, [&](int slot) {
        Arena own{scratches + slot * size};
        const Scratch scratch(s, own);
        const Slice slice(s.chunks.count(), s.slots, slot);
        for (int chunk = slice.begin; chunk < slice.end; ++chunk) use(slot, chunk, scratch);
    });
}

// Each slot has its own.
struct ConvolutionScratch {
    Vector *frame, *totals;  // [frame], [M]
    Doubles* means;          // [K]

    ConvolutionScratch(const Depthwise& d, Arena& arena)
        : frame(arena.take<Vector>(d.stencil.frame())),
          totals(arena.take<Vector>(d.multiplier)),
          means(arena.take<Doubles>(d.outputs)) {}
};

// The maps h [K][stride] of a chunk, less their means [K][vectors], and the statistics of its images.
inline void convolve_chunk(const Depthwise& d, int chunk, Vector* h, Vector* means, const ConvolutionScratch& scratch, const Statistics& statistics) {
    const int M = d.multiplier, P = d.pixels;
    for (int b = 0; b < d.chunks.vectors; ++b) {
        const int first = d.chunks.first(chunk) + b * LANES;
        Doubles total = {}, squares = {};
        for (int c = 0; c < d.channels; ++c) {
            read_frame(d.channel(d.x, c), d.chunks.images, first, d.stencil, scratch.frame);
            Vector* maps = h + c * M * d.stride + b * P;
            convolve(d.stencil, M, scratch.frame, d.taps + (size_t)c * M * d.stencil.taps(), maps, d.stride, scratch.totals);
            for (int t = 0; t < M; ++t) {
                const int row = c * M + t;
                const float shift = d.shift ? d.shift[row] : 0.f;
                Doubles exact, deviations;
                means[row * d.chunks.vectors + b] = centre(maps + t * d.stride, P, scratch.totals[t], exact, deviations) + shift;
                scratch.means[row] = exact + (double)shift;
                total += scratch.means[row];
                squares += deviations;
            }
        }
        const Doubles mean = total / (double)d.outputs;
        for (int row = 0; row < d.outputs; ++row) {
            const Doubles deviation = scratch.means[row] - mean;
            squares += deviation * deviation * (double)P;
        }
        store(statistics.mean + first, mean);
        store(statistics.squares + first, squares);
    }
}

// What each map's mean is more than the norm's, to the pixel beyond the map.
inline void deviations_of_means(const Depthwise& d, int chunk, const Vector* means, const Statistics& statistics, Vector* h) {
    for (int b = 0; b < d.chunks.vectors; ++b) {
        const Integers there = d.chunks.holds_image(chunk, b);
        const Doubles mean = load(statistics.mean + d.chunks.first(chunk) + b * LANES);
        for (int row = 0; row < d.outputs; ++row)
            h[row * d.stride + d.columns + b] = there ? narrow(widen(means[row * d.chunks.vectors + b]) - mean) : Vector{};
    }
}

// Each slot has its own.
struct GradientScratch {
    Vector *frames, *g_frames, *gx;  // [vectors][frame], [M][frame], [pixels]

    GradientScratch(const Depthwise& d, Arena& arena)
        : frames(arena.take<Vector>(d.chunks.vectors * d.stencil.frame())),
          g_frames(arena.take<Vector>(d.multiplier * d.stencil.frame())),
          gx(arena.take<Vector>(d.pixels)) {}
};

// From the gradient g [M][stride] of a chunk's maps of channel `c`: adds those of the taps to sums [M][kernel], whose
// lanes are not yet summed, and writes that of x plus `residual`. Each pointer may be null.
inline void gradients_of_channel(const Depthwise& d, int chunk, int c, const Vector* g, const GradientScratch& scratch, Vector* tap_sums, const float* residual, float* gx) {
    const int M = d.multiplier, B = d.chunks.vectors, images = d.chunks.images, first = d.chunks.first(chunk);
    if (tap_sums) {
        for (int b = 0; b < B; ++b)
            read_frame(d.channel(d.x, c), images, first + b * LANES, d.stencil, scratch.frames + b * d.stencil.frame());
        tap_gradient(d.stencil, M, B, g, d.stride, scratch.frames, tap_sums);
    }
    for (int b = 0; gx && b < B; ++b) {
        Vector* map = scratch.gx;
        input_gradient(d.stencil, M, g + b * d.pixels, d.stride, d.taps + (size_t)c * M * d.stencil.taps(), map, scratch.g_frames);
        if (residual)
            read_images(d.channel(residual, c), d.pixels, images, first + b * LANES, [=](int p, Vector x) INLINE_LAMBDA { map[p] += x; });
        write_images(d.channel(gx, c), d.pixels, images, first + b * LANES, [=](int p) INLINE_LAMBDA { return map[p]; });
    }
}
