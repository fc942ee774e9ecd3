#include "memory.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "fasa.h"

namespace fasa {

namespace {

std::atomic<int64_t> successes_left{-1}; // -1: no injected failure

} // namespace

bool allocation_fails() {
    int64_t left = successes_left.load(std::memory_order_relaxed);
    while (left > 0 && !successes_left.compare_exchange_weak(left, left - 1, std::memory_order_relaxed)) {
    }
    return left == 0;
}

void * allocate_aligned(size_t bytes) {
    if (allocation_fails() || bytes > SIZE_MAX / 2) { // SIZE_MAX / 2: no machine has it, and padding must not wrap
        throw std::bad_alloc();
    }
    const size_t padded = std::max<size_t>((bytes + 63) / 64 * 64, 64);
    void *       p      = ::operator new(padded, kAlignment);
    std::memset(p, 0, padded);
    return p;
}

} // namespace fasa

void fasa_fail_allocations(int64_t successes) { fasa::successes_left.store(successes < 0 ? -1 : successes); }
