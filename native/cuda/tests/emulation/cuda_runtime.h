// Stands in for CUDA's header where there is no GPU: kernels run on the CPU, a thread block or cluster at a time, for
// their tests.
// Each thread is a fiber that runs until it must wait for others; the order of threads is random, so that a barrier
// that is missing shows. Only what pyfasa's kernels use is here; speed means nothing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __noinline__
#define __align__(n) alignas(n)
#define __noinline__
#define __shared__ static // one thread block runs at a time, and clusters have dynamic_shared() only

struct int2 {
    int x, y;
};
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint2  make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- the runtime ---------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void *;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int  programmaticStreamSerializationAllowed;
        dim3 clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3                  gridDim, blockDim;
    size_t                dynamicSmemBytes;
    cudaStream_t          stream;
    cudaLaunchAttribute * attrs;
    unsigned              numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaFuncAttributes {
    int ptxVersion;
};

template <typename F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, F *) { return cudaSuccess; }
template <typename F> cudaError_t cudaOccupancyMaxActiveClusters(int *, F *, const cudaLaunchConfig_t *) {
    return cudaSuccess;
}
template <typename F> cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int) { return cudaSuccess; }

namespace emulation {

cudaError_t run(const cudaLaunchConfig_t & config, const std::function<void()> & kernel);
uint8_t *   dynamic_memory();
void        wait_for_block();
void        wait_for_cluster();
int         rank_in_cluster();
uint8_t *   dynamic_memory(int rank); // of a block of the cluster
// A use of memory by a kernel; without races.cpp nobody asks.
void note(const void * p, size_t size, bool writes, bool atomic);

// What each of 32 lanes gave; none goes on before all have. `what` is checked to be the same in all lanes.
const uint64_t * of_all_lanes(uint64_t own, const char * what);
int              lane();

template <typename T> uint64_t bits_of(T x) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    return bits;
}
template <typename T> T value_of(uint64_t bits) {
    T x;
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}

} // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t * config, void (*kernel)(Parameters...),
                               const Arguments &... arguments) {
    return emulation::run(*config, [&] { kernel(arguments...); });
}

// ---- inside a kernel -----------------------------------------------------------------------------------------------

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp() { emulation::of_all_lanes(0, "__syncwarp"); }
inline void __threadfence() {}

template <typename T> T __shfl_sync(unsigned, T x, int from) {
    return emulation::value_of<T>(emulation::of_all_lanes(emulation::bits_of(x), "__shfl_sync")[from & 31]);
}
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) {
    const uint64_t * all = emulation::of_all_lanes(emulation::bits_of(x), "__shfl_xor_sync");
    return emulation::value_of<T>(all[(emulation::lane() ^ mask) & 31]);
}
template <typename T> T __shfl_up_sync(unsigned, T x, int by) {
    const uint64_t * all  = emulation::of_all_lanes(emulation::bits_of(x), "__shfl_up_sync");
    const int        lane = emulation::lane();
    return emulation::value_of<T>(all[lane >= by ? lane - by : lane]);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    const uint64_t * all  = emulation::of_all_lanes(x ? 1 : 0, "__ballot_sync");
    unsigned         bits = 0;
    for (int i = 0; i < 32; ++i) {
        bits |= static_cast<unsigned>(all[i]) << i;
    }
    return bits;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }

template <typename T> T __ldcs(const T * p) { return *p; }
template <typename T> T __ldcg(const T * p) { return *p; }

#define FASA_ATOMIC [[gnu::noinline, gnu::no_sanitize_thread]]
template <typename T> FASA_ATOMIC T atomicAdd(T * p, T x) {
    emulation::note(p, sizeof(T), true, true);
    const T before = *p;
    *p             = before + x;
    return before;
}
FASA_ATOMIC inline unsigned atomicAnd(unsigned * p, unsigned x) {
    emulation::note(p, sizeof(*p), true, true);
    const unsigned before = *p;
    *p                    = before & x;
    return before;
}
FASA_ATOMIC inline unsigned atomicOr(unsigned * p, unsigned x) {
    emulation::note(p, sizeof(*p), true, true);
    const unsigned before = *p;
    *p                    = before | x;
    return before;
}

template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

inline int      __popc(unsigned x) { return __builtin_popcount(x); }
inline int      __ffs(int x) { return __builtin_ffs(x); }
inline float    __uint_as_float(unsigned x) { return emulation::value_of<float>(x); }
inline float    __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(emulation::bits_of(x)); }
inline float    __logf(float x) { return logf(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    unsigned       out   = 0;
    for (int i = 0; i < 4; ++i) {
        out |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return out;
}

// ---- ptx.cuh -------------------------------------------------------------------------------------------------------

namespace fasa::gpu {

template <typename T> T * dynamic_shared() { return reinterpret_cast<T *>(emulation::dynamic_memory()); }

inline void wait_for_kernel_before() {}
inline void let_kernel_behind_begin() {}

inline int  cluster_rank() { return emulation::rank_in_cluster(); }
inline void cluster_sync() { emulation::wait_for_cluster(); }

template <typename T> T * in_block(T * p, int rank) {
    const auto at = reinterpret_cast<uint8_t *>(p) - emulation::dynamic_memory();
    return reinterpret_cast<T *>(emulation::dynamic_memory(rank) + at);
}

// What is called ahead must be there: a sanitizer sees where it is not.
inline void prefetch_l2(const void * p, size_t bytes = 1) {
    const auto * at = static_cast<const volatile uint8_t *>(p);
    (void) at[0];
    (void) at[bytes - 1];
}
inline void prefetch_l1(const void * p) { prefetch_l2(p); }

// The shape of the instruction: lane 4 g + t has of `a` rows g and g + 8, and bytes from 4 t and 16 + 4 t on; of `b`
// column g, likewise; of `c` rows g and g + 8 of columns 2 t and 2 t + 1.
inline void multiply_add(int32_t c[4], const uint32_t a[4], const int32_t b[2]) {
    uint8_t rows[16][32];
    int8_t  columns[8][32];
    for (int i = 0; i < 4; ++i) {
        const uint64_t * all = emulation::of_all_lanes(a[i], "multiply_add");
        for (int lane = 0; lane < 32; ++lane) {
            std::memcpy(&rows[lane / 4 + i % 2 * 8][i / 2 * 16 + lane % 4 * 4], &all[lane], 4);
        }
    }
    for (int i = 0; i < 2; ++i) {
        const uint64_t * all = emulation::of_all_lanes(emulation::bits_of(b[i]), "multiply_add");
        for (int lane = 0; lane < 32; ++lane) {
            std::memcpy(&columns[lane / 4][i * 16 + lane % 4 * 4], &all[lane], 4);
        }
    }
    for (int i = 0; i < 4; ++i) {
        const int row = emulation::lane() / 4 + i / 2 * 8, column = emulation::lane() % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k) {
            c[i] += rows[row][k] * columns[column][k];
        }
    }
}

} // namespace fasa::gpu
