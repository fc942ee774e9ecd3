// A selection in a short context: all of its cells are in registers. One of up to eight budgets has no more peaks than
// cells to select, so they bound nothing, and of marked cells there would be a large part.
#pragma once

#include "marks.cuh"

namespace fasa::gpu {

constexpr int kAll   = 16; // cells of a thread
constexpr int kShort = 8;  // budgets
constexpr int kMuch  = 4;  // budgets: of less so large a part is selected that filters go wrong from token to token

__device__ inline bool looks_at_all(int n_cell, int budget) {
    return n_cell <= kShort * budget && n_cell <= kAll * kThreads;
}

// What n of `budget` cells, more than that, should reach: a filter's mark.
__device__ inline int aim_of(int n, int budget) { return min(5 * budget / 2, (n + budget) / 2); }

// All cells of a context. A warp has 32 N that follow each other, which its lanes take in turns.
template <int N> struct Cells {
    int          first;
    Registers<N> values;

    __device__ Cells(const float * scores, int n) : first(first_in_turns<N>()) {
#pragma unroll
        for (int i = 0; i < N; ++i) { // all on their way together
            values.x[i] = scores[min(first + 32 * i, n - 1)];
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            values.x[i] = first + 32 * i < n ? values.x[i] : -CUDART_INF_F;
        }
    }
    __device__ void write(Block & block, float t, const Counts & all, int limit, int32_t * out) const {
        write_in_turns(block, values, t, all, Counts{0, 0}, limit, out, [&](int i) { return first + 32 * i; });
    }
};

// Behind clear_bins and a barrier: only cells that reach a filter are counted, in bins of the range that it foretells.
// Not found: too few reach it, or the threshold is not in that range.
template <int N>
__device__ __noinline__ Best best_of_all(Selection & sh, const float * scores, int n_cell, Filter passed, int budget,
                                         int32_t * out) {
    Block          block(sh.exchange);
    const Cells<N> own(scores, n_cell);
    const Range    r = foretold(passed);
    const Binning  bin(r);
    own.values.each([&](float x, int) {
        if (x >= r.lo) {
            atomicAdd(sh.bins + bin(x), 1);
        }
    });
    __syncthreads();
    Best best     = {false, 0, 0.0f};
    best.n_marked = find_bin(sh, block, Cluster<1>(), budget);
    best.found    = r.hi > r.lo && best.n_marked >= budget && tells(sh);
    if (best.found) {
        rank_bin(sh, Cluster<1>(), own.values, bin, r, budget - sh.all.above);
        best.least = sh.result;
        own.write(block, best.least, sh.all, budget, out);
    }
    return best;
}

// The same without a filter, and what the next one should be: of n_visible cells, which are more than budget.
template <int N>
__device__ __noinline__ Filter select_of_all(Selection & sh, const float * scores, int n_cell, int n_visible,
                                             int budget, int32_t * out) {
    Block          block(sh.exchange);
    const Cells<N> own(scores, n_cell);
    const bool     much  = n_cell >= kMuch * budget;
    const float    mark  = much ? kth_largest(sh, own.values, aim_of(n_visible, budget)) : kNoFilter;
    const float    least = kth_largest(sh, own.values, budget);
    int            total;
    count_around(block, own.values, least, &total);
    own.write(block, least, {total >> 16, total & 0xffff}, budget, out);
    return {mark, much ? least : kNoFilter};
}

} // namespace fasa::gpu
