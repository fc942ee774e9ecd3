// A selection from the peaks of eight cells each on.
#pragma once

#include "kth.cuh"

namespace fasa::gpu {

// The peaks that reach the floor, in order, into sh.groups; their number, which is above kHeld when they do not fit.
template <typename Values>
__device__ int list_groups(Selection & sh, Block & block, const Values & peaks, int first, float floor) {
    int own = 0;
    peaks.each([&](float x, int) { own += x >= floor ? 1 : 0; });
    int total;
    int at = block.exclusive_sum(own, &total);
    if (total <= kHeld) {
        peaks.each([&](float x, int i) {
            if (x >= floor) {
                sh.groups[at++] = first + i;
            }
        });
    }
    __syncthreads();
    return total;
}

__device__ inline void load_group(const float * scores, int group, float x[kPeak]) {
    const float4 a = reinterpret_cast<const float4 *>(scores)[2 * group];
    const float4 b = reinterpret_cast<const float4 *>(scores)[2 * group + 1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// Cells that reach the floor, in cell order, into sh.values and sh.cells; their number, which is above kHeld when they
// do not fit. Scores are read twice: the second time they are near.
__device__ inline int gather(Selection & sh, Block & block, const float * scores, int n_group, float floor) {
    constexpr int kMost = kHeld / kThreads,
                  kNear = 3; // groups of a thread, and those whose scores are under way together
    const int     share = (n_group + kThreads - 1) / kThreads;
    const int     first = static_cast<int>(threadIdx.x) * share, n = max(0, min(share, n_group - first));
    int           groups[kMost];
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
        groups[j] = j < n ? sh.groups[first + j] : 0;
    }
    const auto each = [&](auto && f) { // f(score, cell) for cells that reach the floor
#pragma unroll
        for (int j0 = 0; j0 < kMost; j0 += kNear) {
            if (j0 < share) { // no load has a condition of its own
                float x[kNear][kPeak];
#pragma unroll
                for (int j = 0; j < kNear; ++j) {
                    load_group(scores, groups[j0 + j], x[j]);
                }
#pragma unroll
                for (int i = 0; i < kNear * kPeak; ++i) {
                    const int j = i / kPeak;
                    if (j0 + j < n && x[j][i % kPeak] >= floor) {
                        f(x[j][i % kPeak], groups[j0 + j] * kPeak + i % kPeak);
                    }
                }
            }
        }
    };
    int own = 0;
    each([&](float, int) { ++own; });
    int total;
    int at = block.exclusive_sum(own, &total); // its barrier: values may now take the place of groups
    if (total <= kHeld) {
        each([&](float x, int cell) {
            sh.values[at]  = x;
            sh.cells[at++] = cell;
        });
    }
    __syncthreads();
    return total;
}

// Writes up to `limit` cells in order: those whose value is above t, and the first ones that equal it. cell(i): that of
// the thread's value i. FEW: less than 32,768 values.
template <bool FEW, typename Values, typename Cell>
__device__ int write_cells(Block & block, const Values & values, float t, int limit, int32_t * out, Cell && cell) {
    int above = 0, equal = 0;
    values.each([&](float x, int) {
        above += x > t ? 1 : 0;
        equal += x == t ? 1 : 0;
    });
    int n_above, n_all_equal, above_before, equals;
    if (FEW) { // both fit in half a word
        int       total;
        const int before = block.exclusive_sum(above << 16 | equal, &total);
        above_before = before >> 16, equals = before & 0xffff, n_above = total >> 16, n_all_equal = total & 0xffff;
    } else {
        above_before = block.exclusive_sum(above, &n_above);
        equals       = block.exclusive_sum(equal, &n_all_equal);
    }
    const int n_equal = max(0, min(n_all_equal, limit - n_above));
    int       at      = above_before + min(equals, n_equal);
    values.each([&](float x, int i) {
        const bool tie = x == t && equals < n_equal;
        equals += x == t ? 1 : 0;
        if ((x > t || tie) && at < limit) {
            out[at++] = cell(i);
        }
    });
    return min(limit, n_above + n_equal);
}

// The same for all cells of a context, whose scores are in memory.
__device__ inline int write_from_memory(Block & block, const float * scores, int n, float t, int limit, int32_t * out) {
    const InMemory own   = part_of(scores, n);
    const int      first = static_cast<int>(own.x - scores);
    return write_cells<false>(block, own, t, limit, out, [&](int i) { return first + i; });
}

// Candidates in registers, when there are few per thread.
template <int N>
__device__ inline int finish(Selection & sh, Block & block, int n, int budget, float floor, int32_t * out,
                             float * threshold) {
    Registers<N> own;
    const int    first = static_cast<int>(threadIdx.x) * N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        own.x[i] = first + i < n ? sh.values[first + i] : -CUDART_INF_F;
    }
    const float t = n > budget ? kth_largest(sh, own, budget) : floor;
    *threshold    = t;
    return write_cells<true>(block, own, t, budget, out, [&](int i) { return sh.cells[first + i]; });
}

__device__ inline int finish(Selection & sh, Block & block, int n, int budget, float floor, int32_t * out,
                             float * threshold) {
    return n <= 3 * kThreads ? finish<3>(sh, block, n, budget, floor, out, threshold)
                             : finish<kHeld / kThreads>(sh, block, n, budget, floor, out, threshold);
}

template <typename Values>
__device__ int list_candidates(Selection & sh, Block & block, const Values & peaks, int first, const float * scores,
                               float floor) {
    const int n_group = list_groups(sh, block, peaks, first, floor);
    return n_group <= kHeld ? gather(sh, block, scores, n_group, floor) : INT_MAX;
}

// From the peaks on: floor, candidates, threshold. `first`: the thread's first peak; guess: of a floor, or -inf.
template <typename Values>
__device__ int select_from(Selection & sh, Block & block, const Values & peaks, int first, int n_peak,
                           const float * scores, int budget, float guess, int32_t * out) {
    float floor = guess;
    int   n     = floor > -FLT_MAX ? list_candidates(sh, block, peaks, first, scores, floor) : 0;
    if (n < budget || n > kHeld) {
        floor = budget < n_peak ? kth_largest(sh, peaks, budget) : -FLT_MAX;
        n     = list_candidates(sh, block, peaks, first, scores, floor);
    }
    float t;
    int   n_selected = -1;
    if (n <= kHeld) {
        n_selected = finish(sh, block, n, budget, floor, out, &t);
    } else {
        t = kth_largest(sh, part_of(scores, n_peak * kPeak), budget);
    }
    if (threadIdx.x == 0) {
        sh.floor = floor, sh.least = t, sh.reached = n;
    }
    return n_selected >= 0 ? n_selected : write_from_memory(block, scores, n_peak * kPeak, t, budget, out);
}

// N values of each thread in registers, four at a time from memory; their number is a multiple of 8.
template <int N> __device__ Registers<N> load_own(const float * values, int n) {
    Registers<N> own;
    const int    first = static_cast<int>(threadIdx.x) * N;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const float4 x = first + i < n ? *reinterpret_cast<const float4 *>(values + first + i)
                                       : make_float4(-CUDART_INF_F, -CUDART_INF_F, -CUDART_INF_F, -CUDART_INF_F);
        own.x[i] = x.x, own.x[i + 1] = x.y, own.x[i + 2] = x.z, own.x[i + 3] = x.w;
    }
    return own;
}

template <int N>
__device__ int select_in_registers(Selection & sh, Block & block, const float * peaks, int n_peak, const float * scores,
                                   int budget, float guess, int32_t * out) {
    const auto own = load_own<N>(peaks, n_peak);
    return select_from(sh, block, own, static_cast<int>(threadIdx.x) * N, n_peak, scores, budget, guess, out);
}

// All of that for one query; a function of its own, like kth_largest.
__device__ __noinline__ inline int select_from_peaks(Selection & sh, const float * peaks, int n_peak,
                                                     const float * scores, int budget, float guess, int32_t * out) {
    Block block(sh.exchange);
    if (n_peak <= 4 * kThreads) {
        return select_in_registers<4>(sh, block, peaks, n_peak, scores, budget, guess, out);
    }
    if (n_peak <= kPerRun * kThreads) {
        return select_in_registers<kPerRun>(sh, block, peaks, n_peak, scores, budget, guess, out);
    }
    const InMemory own = part_of(peaks, n_peak);
    return select_from(sh, block, own, static_cast<int>(own.x - peaks), n_peak, scores, budget, guess, out);
}

} // namespace fasa::gpu
