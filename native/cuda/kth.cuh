// The k-th largest of a thread block's values, exactly: counted in bins over their range, and again over that of one
// bin while it holds many; the values of the last bin are ranked one against another.
#pragma once

#include <cfloat>
#include <climits>

#include <math_constants.h>

#include "block.cuh"
#include "node.h"

namespace fasa::gpu {

constexpr int kBins   = 2048;
constexpr int kList   = 1024;      // values of the last bin that are ranked one against another
constexpr int kHeld   = 6144;      // candidates in shared memory; with the rest it fits the 64 KiB of sm_75
constexpr int kMarked = 2 * kHeld; // cells, without their values
constexpr int kPerRun = 16;        // peaks of a thread in registers: contexts up to 131,072 cells

struct alignas(16) Selection { // a thread block's shared memory
    Exchange exchange;
    union {
        int32_t bins[kBins];
        float   list[kList];
    };
    union {
        struct {
            union {
                float   values[kHeld];
                int32_t groups[kHeld]; // before the values are known: the peaks that reach the floor
            };
            int32_t cells[kHeld];
        };
        int32_t marked[kMarked];
    };
    int32_t bin, above, count, total;
    float   result;
    float   floor, least; // of a selection from peaks: what its candidates reached, and its least value
    int32_t reached;      // how many candidates
};

// ---- values to choose from: consecutive ones per thread, so that a sum over threads gives their order --------------

template <int N> struct Registers {
    float x[N]; // -inf where there is none

    // f(value, place among the thread's own)
    template <typename F> __device__ void each(F && f) const {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            f(x[i], i);
        }
    }
};

struct InMemory { // this thread's part of an array
    const float * x;
    int           n;

    template <typename F> __device__ void each(F && f) const {
        for (int i = 0; i < n; ++i) {
            f(x[i], i);
        }
    }
};

__device__ inline InMemory part_of(const float * x, int n) {
    const int share = (n + kThreads - 1) / kThreads;
    const int first = min(n, static_cast<int>(threadIdx.x) * share);
    return {x + first, min(share, n - first)};
}

// ---- the k-th largest ----------------------------------------------------------

// Monotone: multiplication by a positive number and subtraction round monotonically, so bins keep the order of values.
// The factor keeps hi - lo and its inverse inside the range of floats.
struct Binning {
    float lo, factor, per_bin;

    __device__ explicit Binning(const Range & r) {
        factor  = r.hi - r.lo > FLT_MAX ? 0.5f : r.hi - r.lo < 1e-30f ? 0x1p100f : 1.0f;
        lo      = r.lo * factor;
        per_bin = (kBins - 1) / (r.hi * factor - lo);
    }
    __device__ int operator()(float x) const {
        return static_cast<int>(fminf(static_cast<float>(kBins - 1), (x * factor - lo) * per_bin));
    }
};

// The bin in which the k-th largest value lies: sh.bin; sh.above values are in higher bins, sh.count in this one.
__device__ inline void find_bin(Selection & sh, Block & block, int k) {
    // Thread t has the bins 2047 - 2t and 2046 - 2t: sums run from the highest bin down.
    const int high = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
    const int a = sh.bins[high], b = sh.bins[high - 1];
    int       total;
    const int before = block.exclusive_sum(a + b, &total);
    if (before < k && before + a >= k) {
        sh.bin = high, sh.above = before, sh.count = a;
    } else if (before + a < k && before + a + b >= k) {
        sh.bin = high - 1, sh.above = before + a, sh.count = b;
    }
    sh.total = 0;
    __syncthreads();
}

// The k-th largest of the values of one bin, at most kList: each thread ranks one. r: what was counted.
template <typename Values>
__device__ float rank_bin(Selection & sh, const Values & values, const Binning & bin, const Range & r, int k) {
    const int at = sh.bin, count = sh.count;
    values.each([&](float x, int) {
        if (x >= r.lo && x <= r.hi && bin(x) == at) {
            sh.list[atomicAdd(&sh.total, 1)] = x; // in the place of bins, which were read before the last barrier
        }
    });
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
        const float x       = sh.list[threadIdx.x];
        int         greater = 0, equal = 0;
        for (int i = 0; i < count; ++i) {
            greater += sh.list[i] > x ? 1 : 0;
            equal += sh.list[i] == x ? 1 : 0;
        }
        if (greater < k && greater + equal >= k) { // equal values write the same
            sh.result = x;
        }
    }
    __syncthreads();
    return sh.result;
}

__device__ inline void clear_bins(Selection & sh) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
        sh.bins[i] = 0;
    }
}

// The k-th largest value, or -FLT_MAX when fewer than k are visible.
template <typename Values> __device__ float kth_largest(Selection & sh, Block & block, const Values & values, int k) {
    // Forced cells are counted apart: they would stretch the range of all others.
    Census own = kNobody;
    values.each([&](float x, int) {
        own.forced += x == kForced ? 1 : 0;
        if (x >= -FLT_MAX && x < kForced) {
            ++own.plain;
            own.range.widen(x);
        }
    });
    const Census all = block.census(own);
    if (all.forced >= k || all.forced + all.plain < k) {
        return all.forced >= k ? kForced : -FLT_MAX;
    }
    k -= all.forced;
    Range r = all.range;
    while (r.lo < r.hi) {
        const Binning bin(r);
        clear_bins(sh);
        __syncthreads();
        values.each([&](float x, int) {
            if (x >= r.lo && x <= r.hi) {
                atomicAdd(sh.bins + bin(x), 1);
            }
        });
        __syncthreads();
        find_bin(sh, block, k);
        k -= sh.above;
        if (sh.count <= kList) {
            return rank_bin(sh, values, bin, r, k);
        }
        // Many values in one bin: its own range is binned next. lo and hi fall into different bins, so this ends.
        const int at    = sh.bin;
        Census    inner = kNobody;
        values.each([&](float x, int) {
            if (x >= r.lo && x <= r.hi && bin(x) == at) {
                inner.range.widen(x);
            }
        });
        r = block.census(inner).range;
    }
    return r.lo;
}

} // namespace fasa::gpu
