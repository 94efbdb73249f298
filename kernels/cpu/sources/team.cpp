#include "team.h"
#include "gelu.h"

void (*openmp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*openmp_thread)() = nullptr;
int (*openmp_threads)() = nullptr;

extern "C" {
// All null: kernels run in the thread that calls them.
EXPORT void fastconv_set_openmp(void* parallel, void* thread, void* threads) {
    openmp_parallel = (void (*)(void (*)(void*), void*, unsigned, unsigned))parallel;
    openmp_thread = (int (*)())thread;
    openmp_threads = (int (*)())threads;
}
EXPORT int fastconv_lanes() { return LANES; }
// Whether the processor has the instructions that this was compiled for.
EXPORT int fastconv_check() { return sum(exponential(Vector{})) == LANES ? 0 : 1; }
}
