// Layer norm of groups of values, and its gradient, by two passes over the values each.
//
// The values lie [groups][length], or [length][groups] if `interleaved`; then lanes are groups, and else values of one
// group. Sums are those of pieces of each group, in doubles, in which they are exact enough, and exact for equal
// values: these become zeros.
#include <cmath>
#include "norm.h"
#include "team.h"

struct LayerNorm {
    int groups, length, interleaved, slots;
    double eps;
    const float* x;
    float *y, *statistics;  // [3][groups]: the mean in two parts, 1 / sqrt(variance + eps)
    void* workspace;
    const float* gy;
    float* gx;
    double* shared;  // see `Ranks`; then there is one group
    Exchange* exchange;
};

namespace {

// Vectors `stride` apart in memory, of which the first `full` have all lanes.
struct Vectors {
    size_t first, stride;
    int full, count, lanes;
};

template <class Use> INLINE void each(const Vectors& v, Use use) {
    size_t at = v.first;
    int i = 0;
    for (; i < v.full; ++i, at += v.stride) use(at, LANES);
    for (; i < v.count; ++i, at += v.stride) use(at, v.lanes);
}

struct Pieces {
    int groups, length, size, count;  // of each group
    bool interleaved;

    explicit Pieces(const LayerNorm& k)
        : groups(k.groups),
          length(k.length),
          size(k.interleaved ? 64 : 4096),
          count(parts(k.length, size)),
          interleaved(k.interleaved) {}
    // A piece of one vector of groups, or of one group, is an item of work. They are in the order of memory.
    int items() const { return count * (interleaved ? parts(groups, LANES) : groups); }
    int piece(int item) const { return interleaved ? item / parts(groups, LANES) : item % count; }
    int group(int item) const { return interleaved ? item % parts(groups, LANES) * LANES : item / count; }
    int lanes(int item) const { return !interleaved ? 1 : group(item) + LANES <= groups ? LANES : groups - group(item); }
    int values(int piece) const { return piece + 1 < count ? size : length - piece * size; }
    Vectors vectors(int item) const {
        const size_t begin = (size_t)piece(item) * size;
        const int n = values(piece(item)), there = lanes(item);
        if (interleaved) return {begin * groups + group(item), (size_t)groups, there == LANES ? n : 0, n, there};
        return {(size_t)group(item) * length + begin, LANES, n / LANES, parts(n, LANES), n % LANES};
    }
    // A number of each group: in lanes where these are groups.
    Vector of_group(const float* numbers, int item) const {
        return interleaved ? load(numbers + group(item), lanes(item)) : broadcast(numbers[group(item)]);
    }
};

// Sums of each piece: [pieces][groups].
struct Sums {
    double *first, *second;

    Sums(const Pieces& pieces, Arena& arena)
        : first(arena.take<double>((size_t)pieces.count * pieces.groups)),
          second(arena.take<double>((size_t)pieces.count * pieces.groups)) {}
};

// Keep the sums of a piece: of each lane where lanes are groups, and else over the lanes.
INLINE void keep(const Pieces& pieces, int item, Doubles x, double* sums) {
    sums += (size_t)pieces.piece(item) * pieces.groups + pieces.group(item);
    if (pieces.interleaved) memcpy(sums, &x, pieces.lanes(item) * sizeof(double));
    else *sums = sum(x);
}

template <class Use> void each_of(int count, int slots, Use use) {
    in_parallel(slots, [&](int slot) {
        const Slice slice(count, slots, slot);
        for (int i = slice.begin; i < slice.end; ++i) use(i);
    });
}

// x less the mean, in units of the deviation.
struct Normalisation {
    Vector mean, rest, scale;

    Normalisation(const Pieces& pieces, const float* statistics, int item)
        : mean(pieces.of_group(statistics, item)),
          rest(pieces.of_group(statistics + pieces.groups, item)),
          scale(pieces.of_group(statistics + 2 * pieces.groups, item)) {}
    INLINE Vector operator()(Vector x) const { return (x - mean - rest) * scale; }
};

// A double as the sum of two floats.
INLINE void split(double x, float* high, float* low) {
    *high = (float)x;
    *low = (float)(x - *high);
}

// The sums of x - start and of its squares. The start is the piece's first value: equal values leave exact zeros, and
// values far from 0 but near each other few digits to lose. If it is an outlier the variance is as large.
void add_up(const LayerNorm& k, const Pieces& pieces, int item, const Sums& sums) {
    const Vectors vectors = pieces.vectors(item);
    const Vector start = pieces.interleaved ? load(k.x + vectors.first, pieces.lanes(item)) : broadcast(k.x[vectors.first]);
    const Doubles wide = widen(start);
    Doubles total = {}, squares = {};
    each(vectors, [&](size_t at, int lanes) INLINE_LAMBDA {
        const Doubles x = widen(load(k.x + at, lanes, start)) - wide;
        total += x;
        squares += x * x;
    });
    keep(pieces, item, total, sums.first);
    keep(pieces, item, squares, sums.second);
}

// Call use(g) for each group; for one that has values elsewhere by the calling thread, which can wait for them.
template <class Use> void each_group(const LayerNorm& k, Use use) { each_of(k.groups, k.shared ? 1 : k.slots, use); }

void finish(const LayerNorm& k, const Pieces& pieces, const Sums& sums) {
    const int G = pieces.groups;
    each_group(k, [&](int g) {
        double total = 0, squares = 0;
        // From here on the first of the two is a piece's mean.
        for (int i = 0; i < pieces.count; ++i) {
            const int n = pieces.values(i);
            const size_t at = (size_t)i * G + g, begin = (size_t)i * pieces.size;
            const double start = k.x[pieces.interleaved ? begin * G + g : (size_t)g * pieces.length + begin];
            const double deviation = sums.first[at] / n;
            squares += sums.second[at] - deviation * sums.first[at];
            sums.first[at] = start + deviation;
            total += n * sums.first[at];
        }
        double mean = total / pieces.length, count = pieces.length;
        for (int i = 0; i < pieces.count; ++i) {
            const double deviation = sums.first[(size_t)i * G + g] - mean;
            squares += pieces.values(i) * deviation * deviation;
        }
        if (double* numbers = k.shared) {
            numbers[0] = count, numbers[1] = mean, numbers[2] = squares;
            k.exchange();
            count = numbers[0], mean = numbers[1], squares = numbers[2];
        }
        split(mean, k.statistics + g, k.statistics + G + g);
        k.statistics[2 * G + g] = (float)(1 / std::sqrt((squares < 0 ? 0 : squares) / count + k.eps));
    });
}

void forward(const LayerNorm& k) {
    const Pieces pieces(k);
    Arena arena{(char*)k.workspace};
    const Sums sums(pieces, arena);
    each_of(pieces.items(), k.slots, [&](int item) { add_up(k, pieces, item, sums); });
    finish(k, pieces, sums);
    each_of(pieces.items(), k.slots, [&](int item) {
        const Normalisation normalise(pieces, k.statistics, item);
        each(pieces.vectors(item), [&](size_t at, int lanes) INLINE_LAMBDA { store(k.y + at, normalise(load(k.x + at, lanes)), lanes); });
    });
}

// Means over each group: of the gradient, in two parts, and of its product with the normalised values: [3][groups].
struct Means {
    float* of;

    Means(const Pieces& pieces, Arena& arena) : of(arena.take<float>((size_t)3 * pieces.groups)) {}
};

// dL/dx = (g - mean(g) - x^ mean(g x^)) scale, where x^ are the normalised values and g their gradient.
void backward(const LayerNorm& k) {
    const Pieces pieces(k);
    const int G = pieces.groups;
    Arena arena{(char*)k.workspace};
    const Sums sums(pieces, arena);
    const Means means(pieces, arena);
    each_of(pieces.items(), k.slots, [&](int item) {
        const Normalisation normalise(pieces, k.statistics, item);
        Doubles total = {}, product = {};
        each(pieces.vectors(item), [&](size_t at, int lanes) INLINE_LAMBDA {
            const Vector g = load(k.gy + at, lanes);
            total += widen(g);
            // Lanes beyond the last value have no gradient, and stay finite.
            product += widen(g * normalise(load(k.x + at, lanes, normalise.mean)));
        });
        keep(pieces, item, total, sums.first);
        keep(pieces, item, product, sums.second);
    });
    each_group(k, [&](int g) {
        double total = 0, product = 0, count = pieces.length;
        for (int i = 0; i < pieces.count; ++i) {
            total += sums.first[(size_t)i * G + g];
            product += sums.second[(size_t)i * G + g];
        }
        if (double* numbers = k.shared) {
            numbers[1] = total, numbers[2] = product;
            k.exchange();
            count = numbers[0], total = numbers[1], product = numbers[2];
        }
        split(total / count, means.of + g, means.of + G + g);
        means.of[2 * G + g] = (float)(product / count);
    });
    each_of(pieces.items(), k.slots, [&](int item) {
        const Normalisation normalise(pieces, k.statistics, item);
        const Vector mean = pieces.of_group(means.of, item), rest = pieces.of_group(means.of + G, item);
        const Vector slope = pieces.of_group(means.of + 2 * G, item);
        each(pieces.vectors(item), [&](size_t at, int lanes) INLINE_LAMBDA {
            const Vector x = normalise(load(k.x + at, lanes)), g = load(k.gy + at, lanes) - mean - rest;
            store(k.gx + at, (g - x * slope) * normalise.scale, lanes);
        });
    });
}

}  // namespace

extern "C" {
EXPORT void fastconv_layer_norm_forward(const LayerNorm* k) { forward(*k); }
EXPORT void fastconv_layer_norm_backward(const LayerNorm* k) { backward(*k); }
EXPORT size_t fastconv_layer_norm_forward_workspace(const LayerNorm* k) { return size_of<Sums>(Pieces(*k)); }
EXPORT size_t fastconv_layer_norm_backward_workspace(const LayerNorm* k) {
    const Pieces pieces(*k);
    return size_of<Sums>(pieces) + size_of<Means>(pieces);
}
}
