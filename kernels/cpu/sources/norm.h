// Layer norm over all images, or over each: mean and variance of each image, combined if they are to be one.
#pragma once
#include <cmath>
#include "chunks.h"

// Subtract from a vector's maps h [pixels] their means, total / pixels, and return them; h plus its mean is what it
// was. A mean is rounded, and what that leaves counts where it is large: `exact` is what the mean would have been, and
// `squares` the sum of squared deviations from it.
INLINE Vector centre(Vector* h, int pixels, Vector total, Doubles& exact, Doubles& squares) {
    const Vector mean = total / (float)pixels;
    Vector rest = {}, square = {};
    for (int p = 0; p < pixels; ++p) {
        const Vector x = h[p] - mean;
        h[p] = x;
        rest += x;
        square += x * x;
    }
    const Doubles r = widen(rest) / (double)pixels;
    exact = widen(mean) + r;
    squares = widen(square) - r * r * (double)pixels;
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
        // The sum of no deviations may be rounded to less than 0.
        for (int n = 0; n < chunks.count() * chunks.lanes(); ++n)
            scale[n] = n < images ? (float)(1 / std::sqrt((squares[n] < 0 ? 0 : squares[n]) / count + eps)) : 0.f;
    }
};

// From the sums over each image of the gradient g of x^ and of g (h - mean), both scaled, to the level and the slope of
// the gradient of h, scale g + level + slope x^. In lanes without an image they are 0.
inline void finish_gradient(const Chunks& chunks, double count, bool over_sample, const float* scale, double* levels, double* slopes) {
    const int images = chunks.images;
    double level = 0, slope = 0;
    if (!over_sample) {
        for (int n = 0; n < images; ++n) level += levels[n], slope += slopes[n];
        count *= images;
    }
    for (int n = 0; n < chunks.count() * chunks.lanes(); ++n) {
        const bool there = n < images;
        levels[n] = there ? -(over_sample ? levels[n] : level) / count : 0;
        slopes[n] = there ? -(double)scale[n] * (over_sample ? slopes[n] : slope) / count : 0;
    }
}
