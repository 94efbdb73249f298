// Layer norm over all images, or over each: mean and variance of each image, combined if they are to be one.
#pragma once
#include <cmath>
#include "chunks.h"

// Subtract from a vector's maps h [pixels] their means, total / pixels, and return them; h plus its mean is what it
// was. A mean is rounded, and what that leaves counts where it is large: `exact` is what the mean would have been, and
// `squares` the sum of squared deviations from it.
INLINE Vector centre(Vector* h, int pixels, Vector total, Doubles& exact, Doubles& squares) {
    const Vector mean = total / (float)pixels;
    // Four sums, each of which waits for its last addition.
    Vector rest[4] = {}, square[4] = {};
    auto add = [&](int p, int i) INLINE_LAMBDA {
        const Vector x = h[p] - mean;
        h[p] = x;
        rest[i] += x;
        square[i] += x * x;
    };
    int p = 0;
    for (; p + 4 <= pixels; p += 4) UNROLL for (int i = 0; i < 4; ++i) add(p + i, i);
    for (; p < pixels; ++p) add(p, 0);
    const Doubles r = widen((rest[0] + rest[1]) + (rest[2] + rest[3])) / (double)pixels;
    exact = widen(mean) + r;
    squares = widen((square[0] + square[1]) + (square[2] + square[3])) - r * r * (double)pixels;
    return mean;
}

// The statistics of each image: its mean and its sum of squared deviations, in arrays of all chunks' lanes.
struct Statistics {
    double *mean, *squares;
    float* scale;  // 1 / sqrt(variance + eps); 0 in lanes without an image

    // From the sums of each image, with `count` values each; over all images together unless `over_sample`.
    void finish(const Chunks& chunks, double count, bool over_sample, double eps) {
        const int images = chunks.images;
        if (!over_sample) {
            double total = 0, deviations = 0;
            for (int n = 0; n < images; ++n) total += mean[n];
            const double centre = total / images;
            for (int n = 0; n < images; ++n) deviations += squares[n] + count * (mean[n] - centre) * (mean[n] - centre);
            for (int n = 0; n < images; ++n) mean[n] = centre, squares[n] = deviations / images;
        }
        for (int n = 0; n < chunks.count() * chunks.lanes(); ++n)
            scale[n] = n < images ? (float)(1 / std::sqrt(squares[n] / count + eps)) : 0.f;
    }
};
