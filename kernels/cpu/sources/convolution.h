// The depthwise convolution of one input channel with several outputs, by "same" zero padding, and its gradients.
//
// Lanes are images, so that a tap is one number and every pixel of every output a vector; a map is a vector's images. Maps of up to 8 columns
// under a kernel of 7 have functions of their own, of the map's width, which multiply by no zero of the padding.
// Others are computed on a frame of zeros, in segments of a row; only rows of padding are left out.
#pragma once
#include "vector.h"

struct Stencil {
    int height, width, kernel_height, kernel_width;

    int pixels() const { return height * width; }
    int taps() const { return kernel_height * kernel_width; }
    // Of a map with its frame. A frame has so many columns before the map, and enough after it for whole segments.
    bool framed() const { return kernel_width != 7 || width > 8; }
    int before() const { return framed() ? kernel_width / 2 : 0; }
    int pitch() const { return framed() ? (width + SEGMENT - 1) / SEGMENT * SEGMENT + kernel_width + TAPS - 2 : width; }
    size_t frame() const { return (size_t)height * pitch(); }

    static constexpr int SEGMENT = 8;  // pixels of a row that are computed at once
    static constexpr int TAPS = 4;     // of a row, whose gradients are summed at once
};

// x [frame] -> h [outputs][pixels], whose outputs lie `stride` vectors apart; and each output's sum over its pixels.
void convolve(const Stencil& s, int outputs, const Vector* x, const float* taps, Vector* h, size_t stride, Vector* sums);

// g [outputs][pixels] -> gx [pixels]; `frames` has room for a frame for each output.
void input_gradient(const Stencil& s, int outputs, const Vector* g, size_t stride, const float* taps, Vector* gx, Vector* frames);

// Adds the gradient of the taps, whose lanes are not yet summed, to sums [outputs][taps], from g [outputs][vectors][pixels]
// and x [vectors][frame].
void tap_gradient(const Stencil& s, int outputs, int vectors, const Vector* g, size_t stride, const Vector* x, Vector* sums);
