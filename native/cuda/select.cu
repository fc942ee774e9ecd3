// select: the `budget` best cells of each query, exactly. One thread block per query, in three steps:
//   floor      the budget-th largest peak: at least that many cells reach it, so no lower cell is needed
//   candidates cells that reach the floor, in cell order, in shared memory when they fit
//   threshold  the budget-th largest candidate; cells above it are selected, and of those equal to it the first ones
// The result depends on the scores only, not on the order in which threads run.
//
// Most tokens take a shorter way to their candidates. Queries of following tokens score much alike, so select leaves a
// filter for the next token, which 2.5 times the budget of cells should reach; score marks those that do, and the
// best of them are the best of all if there are enough. Else all peaks are looked at. The result is the same.
#include "kernels.cuh"
#include "kth.cuh"

namespace fasa::gpu {

namespace {

// ---- from peaks ----------------------------------------------------------------------------------------------------

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

__device__ void load_group(const float * scores, int group, float x[kPeak]) {
    const float4 a = reinterpret_cast<const float4 *>(scores)[2 * group];
    const float4 b = reinterpret_cast<const float4 *>(scores)[2 * group + 1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// Cells that reach the floor, in cell order, into sh.values and sh.cells; their number, which is above kHeld when they
// do not fit. Scores are read twice: the second time they are near.
__device__ int gather(Selection & sh, Block & block, const float * scores, int n_group, float floor) {
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
// the thread's value i. FEW: at most kMarked values.
template <bool FEW, typename Values, typename Cell>
__device__ int write_cells(Selection & sh, Block & block, const Values & values, float t, int limit, int32_t * out,
                           Cell && cell) {
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
__device__ int write_from_memory(Selection & sh, Block & block, const float * scores, int n, float t, int limit,
                                 int32_t * out) {
    const InMemory own   = part_of(scores, n);
    const int      first = static_cast<int>(own.x - scores);
    return write_cells<false>(sh, block, own, t, limit, out, [&](int i) { return first + i; });
}

// Candidates in registers, when there are few per thread.
template <int N>
__device__ int finish(Selection & sh, Block & block, int n, int budget, float floor, int32_t * out, float * threshold) {
    Registers<N> own;
    const int    first = static_cast<int>(threadIdx.x) * N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        own.x[i] = first + i < n ? sh.values[first + i] : -CUDART_INF_F;
    }
    const float t = n > budget ? kth_largest(sh, block, own, budget) : floor;
    *threshold    = t;
    return write_cells<true>(sh, block, own, t, budget, out, [&](int i) { return sh.cells[first + i]; });
}

__device__ int finish(Selection & sh, Block & block, int n, int budget, float floor, int32_t * out, float * threshold) {
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
        floor = budget < n_peak ? kth_largest(sh, block, peaks, budget) : -FLT_MAX;
        n     = list_candidates(sh, block, peaks, first, scores, floor);
    }
    float t;
    int   n_selected = -1;
    if (n <= kHeld) {
        n_selected = finish(sh, block, n, budget, floor, out, &t);
    } else {
        t = kth_largest(sh, block, part_of(scores, n_peak * kPeak), budget);
    }
    if (threadIdx.x == 0) {
        sh.floor = floor, sh.least = t, sh.reached = n;
    }
    return n_selected >= 0 ? n_selected : write_from_memory(sh, block, scores, n_peak * kPeak, t, budget, out);
}

// N peaks of each thread in registers, four at a time from memory.
template <int N>
__device__ int select_in_registers(Selection & sh, Block & block, const float * peaks, int n_peak, const float * scores,
                                   int budget, float guess, int32_t * out) {
    Registers<N> own;
    const int    first = static_cast<int>(threadIdx.x) * N;
#pragma unroll
    for (int i = 0; i < N; i += 4) { // the number of peaks is a multiple of 8
        const float4 x = first + i < n_peak ? *reinterpret_cast<const float4 *>(peaks + first + i)
                                            : make_float4(-CUDART_INF_F, -CUDART_INF_F, -CUDART_INF_F, -CUDART_INF_F);
        own.x[i] = x.x, own.x[i + 1] = x.y, own.x[i + 2] = x.z, own.x[i + 3] = x.w;
    }
    return select_from(sh, block, own, first, n_peak, scores, budget, guess, out);
}

// ---- from marked cells ---------------------------------------------------------------------------------------------

// Marked cells in order into sh.marked; their number, which is above kMarked when they do not fit.
__device__ int list_marked(Selection & sh, Block & block, const uint32_t * marks, int n_cell) {
    constexpr int kPairs = 2;           // of words: all of a thread's in a context of up to 131,072 cells
    const int     words  = n_cell / 32; // a multiple of two
    const int     share  = ((words + kThreads - 1) / kThreads + 1) / 2 * 2;
    const int     first = static_cast<int>(threadIdx.x) * share, end = min(first + share, words);
    const auto    load = [&](int i) { return *reinterpret_cast<const uint2 *>(marks + (i < end ? i : 0)); };
    uint2         held[kPairs]; // on their way together
    int           own = 0;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        held[j] = load(first + 2 * j);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        own += first + 2 * j < end ? __popc(held[j].x) + __popc(held[j].y) : 0;
    }
    for (int i = first + 2 * kPairs; i < end; i += 2) {
        const uint2 w = load(i);
        own += __popc(w.x) + __popc(w.y);
    }
    int        total;
    int        at   = block.exclusive_sum(own, &total);
    const auto list = [&](const uint2 & w, int i) {
        for (uint64_t bits = static_cast<uint64_t>(w.y) << 32 | w.x; bits != 0; bits &= bits - 1) {
            sh.marked[at++] = 32 * i + __ffsll(static_cast<long long>(bits)) - 1;
        }
    };
    if (total <= kMarked) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            if (first + 2 * j < end) {
                list(held[j], first + 2 * j);
            }
        }
        for (int i = first + 2 * kPairs; i < end; i += 2) {
            list(load(i), i);
        }
    }
    __syncthreads();
    return total;
}

// The best of n listed cells, N of each thread. Bins are counted over a range of which their threshold should be a
// quarter of the way up, so that no reduction has to find one.
template <int N>
__device__ int select_listed(Selection & sh, Block & block, const float * scores, int n, const Filter & passed,
                             int budget, int32_t * out, float * threshold) {
    // Rounding of the two means may put the level an ulp below the mark; a range that falls would have bins before the
    // first.
    const Range   r = {passed.mark, passed.mark + 4.0f * fmaxf(passed.level - passed.mark, 0.0f)};
    const Binning bin(r);
    const int     first = static_cast<int>(threadIdx.x) * N;
    Registers<N>  own;
#pragma unroll
    for (int i = 0; i < N; ++i) { // all on their way together
        own.x[i] = scores[sh.marked[min(first + i, n - 1)]];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        own.x[i] = first + i < n ? own.x[i] : -CUDART_INF_F;
        if (first + i < n) {
            atomicAdd(sh.bins + bin(own.x[i]), 1);
        }
    }
    __syncthreads();
    find_bin(sh, block, budget);
    // The last bin has all that lies above.
    const bool found = r.hi > r.lo && sh.bin < kBins - 1 && sh.count <= kList;
    __syncthreads();
    *threshold = found ? rank_bin(sh, own, bin, r, budget - sh.above) : kth_largest(sh, block, own, budget);
    return write_cells<true>(sh, block, own, *threshold, budget, out, [&](int i) { return sh.marked[first + i]; });
}

constexpr float kLogAim = 0.9163f; // of 2.5 budgets
constexpr float kShare  = 0.3f; // of the last token in a filter: the mean of some tokens foretells the next one better

// What so many cells would have reached, if n reached `filter` and `budget` reached t: the number falls about
// exponentially along the tail.
__device__ float next_filter(float filter, float t, int n, int budget, float norm) {
    const float tail = logf(static_cast<float>(n) / static_cast<float>(budget));
    return t - fmaxf((t - filter) * fminf(2.0f, kLogAim / fmaxf(tail, 0.1f)), 0.05f * norm);
}

// What a query leaves for the next token, all in norms.
__device__ Filter blend(const Filter & passed, const Filter & now, float norm) {
    return passed.mark < kNoFilter && now.mark < kNoFilter
               ? Filter{passed.mark / norm + kShare * (now.mark - passed.mark / norm),
                        passed.level / norm + kShare * (now.level - passed.level / norm)}
               : now;
}

// A floor that somewhat more than the budget of cells should reach, from how many reached the filter that went wrong.
__device__ float guess_floor(const Filter & passed, int n_marked, int budget) {
    const float tail = logf(1.7f * static_cast<float>(budget) / static_cast<float>(n_marked));
    return n_marked > 0 && passed.level > passed.mark ? passed.mark - (passed.level - passed.mark) * tail / kLogAim
                                                      : -CUDART_INF_F;
}

__global__ void __launch_bounds__(kThreads) select_kernel(const Node node) {
    extern __shared__ __align__(16) uint8_t raw[];
    Selection &                             sh    = *reinterpret_cast<Selection *>(raw);
    const int                               query = blockIdx.x;
    const int     n_cell = static_cast<int>(n_blocks(node.n_kv)) * FASA_BLOCK_CELLS, n_peak = n_cell / kPeak;
    const float * scores = node.scratch.scores + static_cast<int64_t>(query) * n_cell;
    const float * peaks  = node.scratch.peaks + static_cast<int64_t>(query) * n_peak;
    int32_t *     out    = node.scratch.cells + static_cast<int64_t>(query) * node.max_selected;
    Block         block(sh.exchange);
    const int     n_visible = node.scratch.n_visible[query / node.n_head];
    const float   norm      = node.scratch.norms[query];
    const Filter  passed    = node.scratch.thresholds[query]; // +inf: nothing is marked
    int           n         = -1;
    float         guess     = -CUDART_INF_F;
    Filter        filter    = {kNoFilter, kNoFilter};
    clear_bins(sh); // the barriers of list_marked come before their use
    if (n_visible < node.min_ctx ||
        n_visible <= node.budget) { // a row that sees few cells attends all: exact attention
        n = write_from_memory(sh, block, scores, n_cell, -FLT_MAX, node.max_selected, out);
    } else if (passed.mark < kNoFilter) {
        const int n_marked =
            list_marked(sh, block, node.scratch.marks + static_cast<int64_t>(query) * (n_cell / 32), n_cell);
        if (n_marked >= node.budget && n_marked <= kMarked) {
            float t;
            n = n_marked <= 3 * kThreads ? select_listed<3>(sh, block, scores, n_marked, passed, node.budget, out, &t)
                : n_marked <= 6 * kThreads
                    ? select_listed<6>(sh, block, scores, n_marked, passed, node.budget, out, &t)
                    : select_listed<kMarked / kThreads>(sh, block, scores, n_marked, passed, node.budget, out, &t);
            if (t < kForced) {
                filter = {next_filter(passed.mark, t, n_marked, node.budget, norm) / norm, t / norm};
            }
            if (threadIdx.x == 0) {
                atomicAdd(reinterpret_cast<unsigned long long *>(node.scratch.totals + 3), 1ull);
            }
        } else {
            guess = guess_floor(passed, n_marked, node.budget);
        }
    }
    if (n < 0) {
        __syncthreads();
        if (n_peak <= 4 * kThreads) {
            n = select_in_registers<4>(sh, block, peaks, n_peak, scores, node.budget, guess, out);
        } else if (n_peak <= kPerRun * kThreads) {
            n = select_in_registers<kPerRun>(sh, block, peaks, n_peak, scores, node.budget, guess, out);
        } else {
            const InMemory own = part_of(peaks, n_peak);
            n = select_from(sh, block, own, static_cast<int>(own.x - peaks), n_peak, scores, node.budget, guess, out);
        }
        if (threadIdx.x == 0 && sh.floor > -FLT_MAX && sh.least < kForced && norm > 0.0f) {
            const bool  counted = sh.reached <= kHeld && sh.reached >= node.budget;
            const float next    = counted ? next_filter(sh.floor, sh.least, sh.reached, node.budget, norm) : sh.floor;
            filter              = {next / norm, sh.least / norm};
        }
    }
    if (threadIdx.x == 0) {
        node.filters[query]            = blend(passed, filter, norm);
        node.scratch.n_selected[query] = n;
        atomicAdd(reinterpret_cast<unsigned long long *>(node.scratch.totals),
                  static_cast<unsigned long long>(n_visible));
        atomicAdd(reinterpret_cast<unsigned long long *>(node.scratch.totals + 1), static_cast<unsigned long long>(n));
    }
}

} // namespace

cudaError_t launch_select(const Node & node, cudaStream_t stream) {
    const int n_query = node.n_head * node.n_rows * node.n_stream;
    select_kernel<<<n_query, kThreads, sizeof(Selection), stream>>>(node);
    return cudaGetLastError();
}

cudaError_t prepare_select() {
    return cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Selection));
}

} // namespace fasa::gpu
