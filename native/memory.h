// Large arrays: aligned for vectors, and able to fail on demand so that tests can see what happens then.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fasa {

constexpr std::align_val_t kAlignment{64};

struct AlignedFree {
    void operator()(void * p) const { ::operator delete(p, kAlignment); }
};
template <typename T> using Aligned = std::unique_ptr<T[], AlignedFree>;

bool allocation_fails(); // the injected failure of the next allocation, see fasa_fail_allocations

// 64-byte aligned and zeroed; throws std::bad_alloc.
void * allocate_aligned(size_t bytes);

template <typename T> Aligned<T> make_aligned(int64_t n) {
    return Aligned<T>(static_cast<T *>(allocate_aligned(static_cast<size_t>(n) * sizeof(T))));
}

} // namespace fasa
