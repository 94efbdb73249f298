// Layer norm over all images, or over each: mean and variance of each image, combined if they are to be one.
#pragma once
#include <cmath>
#include "chunks.h"

// What a norm needs of other processes that have values of it. Between its passes a kernel writes its own numbers and
// calls `exchange`, by the thread that called it: then they are those of all. Both are null if all values are here.
using Exchange = void();
struct Ranks {
    double* numbers;  // forward: count, mean, sum of squared deviations; backward: count, of all, and two sums
    Exchange* exchange;
};

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
    void finish(const Chunks& chunks, double count, bool over_sample, double eps, const Ranks& ranks) {
        const int images = chunks.images;
        if (!over_sample) {
            double total = 0, deviations = 0;
            for (int n = 0; n < images; ++n) total += mean[n];
            double centre = total / images, values = count * images;
            for (int n = 0; n < images; ++n) deviations += squares[n] + count * (mean[n] - centre) * (mean[n] - centre);
            if (double* numbers = ranks.numbers) {
                numbers[0] = values, numbers[1] = centre, numbers[2] = deviations;
                ranks.exchange();
                values = numbers[0], centre = numbers[1], deviations = numbers[2];
            }
            for (int n = 0; n < images; ++n) mean[n] = centre, squares[n] = deviations / (values / count);
        }
        // The sum of no deviations may be rounded to less than 0.
        for (int n = 0; n < chunks.count() * chunks.lanes(); ++n)
            scale[n] = n < images ? (float)(1 / std::sqrt((squares[n] < 0 ? 0 : squares[n]) / count + eps)) : 0.f;
    }
};

// From the sums over each image of the gradient g of x^ and of g (h - mean), both scaled, to the level and the slope of
// the gradient of h, scale g + level + slope x^. In lanes without an image they are 0.
inline void finish_gradient(const Chunks& chunks, double count, bool over_sample, const Ranks& ranks, const float* scale, double* levels, double* slopes) {
    const int images = chunks.images;
    double level = 0, slope = 0;
    if (!over_sample) {
        for (int n = 0; n < images; ++n) level += levels[n], slope += slopes[n];
        count *= images;
        if (double* numbers = ranks.numbers) {
            // The sum of g itself, as it is exchanged: images of one norm have one scale.
            numbers[1] = level / scale[0], numbers[2] = slope;
            ranks.exchange();
            count = numbers[0], level = numbers[1] * scale[0], slope = numbers[2];
        }
    }
    for (int n = 0; n < chunks.count() * chunks.lanes(); ++n) {
        const bool there = n < images;
        levels[n] = there ? -(over_sample ? levels[n] : level) / count : 0;
        slopes[n] = there ? -(double)scale[n] * (over_sample ? slopes[n] : slope) / count : 0;
    }
}
