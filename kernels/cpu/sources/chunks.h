// Maps between memory, where they lie [channels][pixels][images], and chunks of images, where they are vectors:
// [channels][vectors][pixels].
#pragma once
#include "convolution.h"
#include "vector.h"

// Most vectors of images beside each other in a chunk.
constexpr int MOST_VECTORS = 8;

// Images in chunks of `vectors` vectors. The lanes beyond the last image hold zeros.
struct Chunks {
    int images, vectors;

    int lanes() const { return vectors * LANES; }
    int count() const { return (images + lanes() - 1) / lanes(); }
    int first(int chunk) const { return chunk * lanes(); }
    // Of a chunk's vector b, the lanes that hold an image.
    Integers holds_image(int chunk, int b) const {
        Integers lane;
        for (int i = 0; i < LANES; ++i) lane[i] = i;
        return lane < images - first(chunk) - b * LANES;
    }
};

// Call use(p, x) for each pixel p of one vector of images, whose first is `first`, of a channel [pixels][images].
template <class Use> INLINE void read_images(const float* channel, int pixels, int images, int first, Use use) {
    channel += first;
    if (first + LANES <= images)
        for (int p = 0; p < pixels; ++p) use(p, load(channel + (size_t)p * images));
    else
        for (int p = 0; p < pixels; ++p) {
            Vector x = {};
            if (first < images) x = load(channel + (size_t)p * images, images - first);
            use(p, x);
        }
}

// The inverse: `make(p)` gives each pixel's vector.
template <class Make> INLINE void write_images(float* channel, int pixels, int images, int first, Make make) {
    channel += first;
    if (first + LANES <= images)
        for (int p = 0; p < pixels; ++p) store(channel + (size_t)p * images, make(p));
    else if (first < images)
        for (int p = 0; p < pixels; ++p) store(channel + (size_t)p * images, make(p), images - first);
}

// The same images as `convolve` takes them.
inline void read_frame(const float* channel, int images, int first, const Stencil& s, Vector* frame) {
    const int left = s.before(), right = s.pitch() - left - s.width;
    for (int i = 0; i < s.height; ++i, frame += s.pitch(), channel += (size_t)s.width * images) {
        for (int j = 0; j < left; ++j) frame[j] = Vector{};
        read_images(channel, s.width, images, first, [=](int j, Vector x) INLINE_LAMBDA { frame[left + j] = x; });
        for (int j = 0; j < right; ++j) frame[left + s.width + j] = Vector{};
    }
}

// Between parts of memory AddressSanitizer finds accesses out of bounds, if something lies there.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
constexpr size_t GAP = 64;
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) ((void)0)
constexpr size_t GAP = 0;
#endif

// Hands out parts of a piece of memory. If that is null it only adds up their size.
struct Arena {
    char* memory;
    size_t size = 0;

    template <class T> T* take(size_t count) {
        const size_t begin = size, end = begin + count * sizeof(T);
        size = (end + 63) / 64 * 64 + GAP;
        if (!memory) return nullptr;
        ASAN_POISON_MEMORY_REGION(memory + end, size - end);
        return (T*)(memory + begin);
    }
    char* rest() const { return memory + size; }
};

// How much memory a part takes whose constructor takes it from an arena.
template <class Part, class Sizes> size_t size_of(const Sizes& sizes) {
    Arena arena{nullptr};
    Part part(sizes, arena);
    return arena.size;
}
