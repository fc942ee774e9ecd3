// What the threads of a block find out together: sums in the order of threads, ranges, counts. One barrier each.
#pragma once

#include <cfloat>
#include <cstdint>

#include "ptx.cuh"
#include "warp.cuh"

namespace fasa::gpu {

constexpr int kThreads = 1024; // of the block
constexpr int kWarps   = kThreads / 32;

struct Range {
    float lo, hi;

    __device__ void widen(float x) { lo = fminf(lo, x), hi = fmaxf(hi, x); }
};

struct Census {
    int   forced, plain;
    Range range;
};

constexpr Census kNobody = {0, 0, {FLT_MAX, -FLT_MAX}};

// Exchanges take turns in two sets of places: whoever writes for the next one has passed the barrier of this one, and
// the set of this one is written again only behind the next one's barrier, when all have read it.
struct Exchange {
    int32_t sums[2][kWarps];
    int32_t forced[2][kWarps], plain[2][kWarps];
    float   lo[2][kWarps], hi[2][kWarps];
};

// A thread's view of an exchange; all threads count their turns alike.
class Block {
  public:
    __device__ explicit Block(Exchange & exchange) : e_(exchange) {}

    // Sum over the threads before this one; *total: over all.
    __device__ int exclusive_sum(int x, int * total) {
        const int lane = threadIdx.x % 32, sum = warp_inclusive_sum(x, lane);
        return sum_of_warps_before(lane == 31, sum, total) + sum - x;
    }

    // Sum over the warps before this one; x: of the warp, in the lane that gives it.
    __device__ int sum_of_warps_before(bool gives, int x, int * total) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        turn_ ^= 1;
        if (gives) {
            e_.sums[turn_][warp] = x;
        }
        __syncthreads();
        const int before    = warp_inclusive_sum(e_.sums[turn_][lane], lane);
        *total              = __shfl_sync(~0u, before, 31);
        const int of_before = __shfl_sync(~0u, before, warp > 0 ? warp - 1 : 0);
        return warp > 0 ? of_before : 0;
    }

    __device__ Census census(Census own) {
        reduce(&own);
        turn_ ^= 1;
        if (threadIdx.x % 32 == 0) {
            const int warp         = threadIdx.x / 32;
            e_.forced[turn_][warp] = own.forced, e_.plain[turn_][warp] = own.plain;
            e_.lo[turn_][warp] = own.range.lo, e_.hi[turn_][warp] = own.range.hi;
        }
        __syncthreads();
        const int lane = threadIdx.x % 32;
        own            = {e_.forced[turn_][lane], e_.plain[turn_][lane], {e_.lo[turn_][lane], e_.hi[turn_][lane]}};
        reduce(&own);
        return own;
    }

  private:
    static __device__ void reduce(Census * c) {
#pragma unroll
        for (int i = 16; i > 0; i /= 2) {
            c->forced += __shfl_xor_sync(~0u, c->forced, i);
            c->plain += __shfl_xor_sync(~0u, c->plain, i);
            c->range.lo = fminf(c->range.lo, __shfl_xor_sync(~0u, c->range.lo, i));
            c->range.hi = fmaxf(c->range.hi, __shfl_xor_sync(~0u, c->range.hi, i));
        }
    }

    Exchange & e_;
    int        turn_ = 0;
};

// The thread blocks of a cluster, which work on the same query (from sm_90 on; else one).
template <int BLOCKS> class Cluster {
  public:
    __device__     Cluster() : rank_(BLOCKS > 1 ? cluster_rank() : 0) {}
    __device__ int rank() const { return rank_; }

    // What another block has in its shared memory at p of this one's.
    template <typename T> __device__ T * of(T * p, int rank) const { return BLOCKS > 1 ? in_block(p, rank) : p; }

    // All threads of all blocks.
    __device__ void sync() const {
        if constexpr (BLOCKS > 1) {
            cluster_sync();
        } else {
            __syncthreads();
        }
    }

  private:
    int rank_;
};

} // namespace fasa::gpu
