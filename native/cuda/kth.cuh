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
constexpr int kList   = 512;       // values of the last bin that are ranked one against another
constexpr int kHeld   = 6144;      // candidates in shared memory; with the rest it fits the 64 KiB of sm_75
constexpr int kMarked = 2 * kHeld; // cells, without their values
constexpr int kPerRun = 16;        // peaks of a thread in registers: contexts up to 131,072 cells

struct Counts { // cells above a threshold, or in bins above its own, and such as equal it
    int32_t above, equal;
};

struct Listed {
    float   x;
    int32_t rank; // of its block
};

struct alignas(16) Selection { // a thread block's shared memory
    Exchange exchange;
    int32_t  bins[kBins];
    Listed   list[kList];
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
    int32_t bin, count, n_listed;
    Counts  all, before; // before: of the thread blocks before this one
    float   result;
    int32_t n_marked;     // of this block
    float   floor, least; // of a selection from peaks: what its candidates reached, and its least value
    int32_t reached;      // how many candidates
};

static_assert(sizeof(Selection) <= 64 * 1024, "what a thread block of sm_75 may have");
static_assert(kMarked < 0x8000, "counts of a block in half a word");

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

// The bin in which the k-th largest value of all blocks lies, sh.bin, which has sh.count of them; sh.all.above: how
// many are in higher bins, sh.before.above: of blocks before this one. Returns how many were counted; when these are
// fewer than k there is no such bin.
template <int BLOCKS> __device__ int find_bin(Selection & sh, Block & block, const Cluster<BLOCKS> & cluster, int k) {
    // Thread t has the bins 2047 - 2t and 2046 - 2t: sums run from the highest bin down. Those of blocks before this
    // one are in the upper half of a word.
    const int high = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
    int       a = 0, b = 0, total;
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
        const int2 x    = *reinterpret_cast<const int2 *>(cluster.of(sh.bins + high - 1, i));
        const int  unit = i < cluster.rank() ? 0x10001 : 1;
        a += unit * x.y, b += unit * x.x;
    }
    const int  before = block.exclusive_sum(a + b, &total), between = before + a, after = between + b;
    const auto all       = [](int sum) { return BLOCKS > 1 ? sum & 0xffff : sum; };
    const auto of_before = [](int sum) { return BLOCKS > 1 ? sum >> 16 : 0; };
    if (all(before) < k && all(between) >= k) {
        sh.bin = high, sh.count = all(a), sh.all.above = all(before), sh.before.above = of_before(before);
    } else if (all(between) < k && all(after) >= k) {
        sh.bin = high - 1, sh.count = all(b), sh.all.above = all(between), sh.before.above = of_before(between);
    }
    __syncthreads();
    return all(total);
}

// The k-th largest of the values of that bin, at most kList: sh.result. Each thread ranks one. sh.all and sh.before
// count from it then. r: what was counted.
template <typename Values, int BLOCKS>
__device__ void rank_bin(Selection & sh, const Cluster<BLOCKS> & cluster, const Values & values, const Binning & bin,
                         const Range & r, int k) {
    const int at = sh.bin, count = sh.count, above = sh.all.above, of_before = sh.before.above;
    values.each([&](float x, int) {
        if (x >= r.lo && x <= r.hi && bin(x) == at) {
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) { // each block has the list
                const int place                 = atomicAdd(cluster.of(&sh.n_listed, i), 1);
                *cluster.of(sh.list + place, i) = {x, cluster.rank()};
            }
        }
    });
    cluster.sync();
    const int own = threadIdx.x;
    if (own < count) {
        const float x   = sh.list[own].x;
        Counts      all = {0, 0}, before = {0, 0};
        bool        is_first = true; // of equal values
        for (int i = 0; i < count; ++i) {
            const Listed listed = sh.list[i];
            const Counts counts = {listed.x > x ? 1 : 0, listed.x == x ? 1 : 0};
            all.above += counts.above, all.equal += counts.equal;
            if (listed.rank < cluster.rank()) {
                before.above += counts.above, before.equal += counts.equal;
            }
            is_first = is_first && (i >= own || listed.x != x);
        }
        if (is_first && all.above < k && all.above + all.equal >= k) {
            sh.result = x;
            sh.all    = {above + all.above, all.equal};
            sh.before = {of_before + before.above, before.equal};
        }
    }
    __syncthreads();
}

// Before a find_bin and the rank_bin behind it, and a barrier before the counting.
__device__ inline void clear_bins(Selection & sh) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
        sh.bins[i] = 0;
    }
    if (threadIdx.x == 0) {
        sh.n_listed = 0;
    }
}

// The k-th largest value, or -FLT_MAX when fewer than k are visible.
template <typename Values> __device__ float find_kth(Selection & sh, Block & block, const Values & values, int k) {
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
        find_bin(sh, block, Cluster<1>(), k);
        k -= sh.all.above;
        if (sh.count <= kList) {
            rank_bin(sh, Cluster<1>(), values, bin, r, k);
            return sh.result;
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

// The same as a function of its own, between two barriers: kernels seldom come here, and are faster without its code.
template <typename Values> __device__ __noinline__ float kth_largest(Selection & sh, Values values, int k) {
    Block block(sh.exchange);
    __syncthreads();
    const float x = find_kth(sh, block, values, k);
    __syncthreads();
    return x;
}

} // namespace fasa::gpu
