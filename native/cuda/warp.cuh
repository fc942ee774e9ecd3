// What the lanes of a warp find out together; all of them get the same bits, whatever their order.
#pragma once

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

} // namespace fasa::gpu
