// What CUDA C++ has no word for. A build without nvcc has functions of the same names (tests/emulation/cuda_runtime.h).
#pragma once

#include <cuda_runtime.h>

#ifdef __CUDACC__

#include <cstdint>

namespace fasa::gpu {

// The shared memory that a launch asks for.
template <typename T> __device__ T * dynamic_shared() {
    extern __shared__ __align__(16) uint8_t bytes[];
    return reinterpret_cast<T *>(bytes);
}

// In a kernel of launch_early: what the kernels in front write may be read from here on, and what they read written.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all thread blocks have said so, those of a kernel of launch_early behind this one take places that are free.
__device__ inline void let_kernel_behind_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline int cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
#endif
    return static_cast<int>(rank);
}

// All threads of a cluster's blocks; what they wrote to shared memory before may be read after, by all of them.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// What another block of the cluster has in its shared memory where this one has p.
template <typename T> __device__ T * in_block(T * p, int rank) {
    T * there = p;
#if __CUDA_ARCH__ >= 900
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
#endif
    return there;
}

__device__ inline void prefetch_l1(const void * p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

__device__ inline void prefetch_l2(const void * p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Multiples of 16 bytes; nothing before sm_90.
__device__ inline void prefetch_l2(const void * p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// c += a * b of 16 rows and 8 columns, 32 deep: a unsigned bytes, b signed ones.
__device__ inline void multiply_add(int32_t c[4], const uint32_t a[4], const int32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) { // a quarter of it each, laid out alike
        asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[i % 2 * 2]), "+r"(c[i % 2 * 2 + 1])
            : "r"(a[i]), "r"(b[i / 2]));
    }
#endif
}

} // namespace fasa::gpu

#endif
