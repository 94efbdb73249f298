// Threads: those of the OpenMP runtime that PyTorch has loaded, through three of its functions.
#pragma once
#include <cstddef>

extern "C" {
// GOMP_parallel(body, data, threads, flags): every thread of a team calls body(data).
extern void (*openmp_parallel)(void (*)(void*), void*, unsigned, unsigned);
extern int (*openmp_thread)();   // omp_get_thread_num
extern int (*openmp_threads)();  // omp_get_num_threads
}

// Calls f(slot) for each slot, by as many threads. Which thread takes a slot is not fixed, if there are fewer; so
// sums belong to slots, and what they are does not depend on the threads.
template <class F> void in_parallel(int slots, F f) {
    if (slots == 1 || !openmp_parallel) {
        for (int slot = 0; slot < slots; ++slot) f(slot);
        return;
    }
    struct Shared {
        F& f;
        int slots;
    } shared{f, slots};
    auto body = [](void* data) {
        Shared& shared = *(Shared*)data;
        for (int slot = openmp_thread(), threads = openmp_threads(); slot < shared.slots; slot += threads) shared.f(slot);
    };
    openmp_parallel(body, &shared, slots, 0);
}

// How many parts of a size there are, of which the last may be smaller.
inline int parts(int count, int size) { return (count + size - 1) / size; }

// What a slot has of `count` things.
struct Slice {
    int begin, end;
    Slice(long count, int slots, int slot) : begin(count * slot / slots), end(count * (slot + 1) / slots) {}
};

// to[i] = the sum of part(slot, i) over the slots, in their order; nothing if `to` is null.
template <class Part> void sum_slots(int slots, float* to, size_t length, Part part) {
    if (!to) return;
    in_parallel(slots, [&](int slot) {
        const Slice slice(length, slots, slot);
        for (int i = slice.begin; i < slice.end; ++i) {
            float total = 0;
            for (int other = 0; other < slots; ++other) total += part(other, i);
            to[i] = total;
        }
    });
}
