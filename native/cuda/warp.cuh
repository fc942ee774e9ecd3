// What the lanes of a warp find out together; all of them get the same bits, whatever their order.
#pragma once

#include <cstdint>

namespace fasa::gpu {

template <typename T> __device__ T warp_sum(T x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        x += __shfl_xor_sync(~0u, x, i);
    }
    return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
    }
    return x;
}

// Of whole numbers, and of numbers that are not negative, whose bits have their order: one instruction where there is
// one.
__device__ inline int warp_total(int x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(~0u, x);
#else
    return warp_sum(x);
#endif
}

__device__ inline uint32_t warp_top(uint32_t x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, x);
#else
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        x = max(x, __shfl_xor_sync(~0u, x, i));
    }
    return x;
#endif
}

__device__ inline float warp_peak(float x) { return __uint_as_float(warp_top(__float_as_uint(x))); }

__device__ inline int warp_inclusive_sum(int x, int lane) {
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        const int y = __shfl_up_sync(~0u, x, i);
        x += lane >= i ? y : 0;
    }
    return x;
}

} // namespace fasa::gpu
