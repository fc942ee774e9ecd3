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
#include "marks.cuh"

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
// the thread's value i. FEW: at most kHeld values.
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
__device__ int write_from_memory(Block & block, const float * scores, int n, float t, int limit, int32_t * out) {
    const InMemory own   = part_of(scores, n);
    const int      first = static_cast<int>(own.x - scores);
    return write_cells<false>(block, own, t, limit, out, [&](int i) { return first + i; });
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
    const float t = n > budget ? kth_largest(sh, own, budget) : floor;
    *threshold    = t;
    return write_cells<true>(block, own, t, budget, out, [&](int i) { return sh.cells[first + i]; });
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

// All of that for one query; a function of its own, like kth_largest.
__device__ __noinline__ int select_from_peaks(Selection & sh, const float * peaks, int n_peak, const float * scores,
                                              int budget, float guess, int32_t * out) {
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

// ---- filters -------------------------------------------------------------------------------------------------------

// In a long context there is more to list, and how many cells are marked varies more from token to token: two thread
// blocks have room for twice as many.
constexpr int kBoth    = 2;
constexpr int kLong    = 24; // budgets
constexpr int kCallers = 64; // thread blocks behind those of queries, or half as many

template <int BLOCKS> constexpr float kLogAim = BLOCKS > 1 ? 1.1632f : 0.9163f; // of 3.2 budgets, and of 2.5
constexpr float kShare = 0.3f; // of the last token in a filter: the mean of some tokens foretells the next one better

// How far below a threshold the next mark should be, in units of what n cells reached below it: their number falls
// about exponentially along the tail.
__device__ float step_of(int n, int budget, float aim) {
    return fminf(2.0f, aim / fmaxf(__logf(static_cast<float>(n) / static_cast<float>(budget)), 0.1f));
}

// What so many cells would have reached, if n reached `filter` and `budget` reached t.
__device__ float next_mark(float filter, float t, float step, float norm) {
    return t - fmaxf((t - filter) * step, 0.05f * norm);
}

// What a query leaves for the next token; all in norms.
__device__ Filter blend(const Filter & passed, const Filter & now) {
    return passed.mark < kNoFilter && now.mark < kNoFilter ? Filter{passed.mark + kShare * (now.mark - passed.mark),
                                                                    passed.level + kShare * (now.level - passed.level)}
                                                           : now;
}

// A floor that somewhat more than the budget of cells should reach, from how many reached the filter that went wrong.
__device__ float guess_floor(const Filter & passed, int n_marked, int budget, float aim) {
    const float tail = logf(1.7f * static_cast<float>(budget) / static_cast<float>(n_marked));
    return n_marked > 0 && passed.level > passed.mark ? passed.mark - (passed.level - passed.mark) * tail / aim
                                                      : -CUDART_INF_F;
}

// ---- what comes behind attention -----------------------------------------------------------------------------------

// Memory has next to nothing to do while cells are selected, by one thread block per query. Thread blocks behind these
// call llama.cpp's next weights into the L2 cache, up to `left` bytes in all.
__device__ void call_ahead(const Piece * pieces, int64_t left, int thread, int n_thread) {
    constexpr int64_t kChunk = 4096;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        const int64_t bytes = min(left, pieces[i].bytes) / 16 * 16;
        for (int64_t at = thread * kChunk; at < bytes; at += n_thread * kChunk) {
            prefetch_l2(pieces[i].data + at, static_cast<uint32_t>(min(kChunk, bytes - at)));
        }
        left -= bytes;
    }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

// Of `BLOCKS` thread blocks of a query the first one does what they do not do together.
template <int BLOCKS>
__global__ void __launch_bounds__(kThreads) select_kernel(const Node node, int n_query, int64_t ahead_bytes) {
    constexpr float kAim  = kLogAim<BLOCKS>;
    Selection &     sh    = *dynamic_shared<Selection>();
    const int       query = static_cast<int>(blockIdx.x) / BLOCKS;
    wait_for_kernel_before();
    let_kernel_behind_begin();
    if (query >= n_query) {
        const int n_before = n_query * BLOCKS, thread = threadIdx.x;
        if (thread < 32) {
            call_ahead(node.ahead, ahead_bytes, (static_cast<int>(blockIdx.x) - n_before) * 32 + thread,
                       (static_cast<int>(gridDim.x) - n_before) * 32);
        }
        return;
    }
    const Cluster<BLOCKS> cluster;
    clear_bins(sh); // the barriers of list_marked come before their use
    const int           n_cell = static_cast<int>(n_blocks(node.n_kv)) * FASA_BLOCK_CELLS, n_peak = n_cell / kPeak;
    const float *       scores = node.scratch.scores + static_cast<int64_t>(query) * n_cell;
    int32_t *           out    = node.scratch.cells + static_cast<int64_t>(query) * node.max_selected;
    Block               block(sh.exchange);
    const Marks<BLOCKS> marks(node.scratch.marks + static_cast<int64_t>(query) * (n_cell / 32), n_cell / 32,
                              cluster.rank());
    const int           n_visible = node.scratch.n_visible[query < node.n_head ? 0 : query / node.n_head];
    const float         norm      = node.scratch.norms[query];
    const Filter        passed    = node.scratch.thresholds[query]; // +inf: nothing is marked
    // In norms, what selections left for this token: it need not wait for them here.
    const float  unit = norm > 1e-30f ? 1.0f / norm : 0.0f;
    const Filter before =
        passed.mark < kNoFilter ? Filter{passed.mark * unit, passed.level * unit} : Filter{kNoFilter, kNoFilter};
    int    n      = -1;
    float  guess  = -CUDART_INF_F;
    Filter filter = {kNoFilter, kNoFilter};
    if (n_visible < node.min_ctx ||
        n_visible <= node.budget) { // a row that sees few cells attends all: exact attention
        if (cluster.rank() == 0) {
            n = write_from_memory(block, scores, n_cell, -FLT_MAX, node.max_selected, out);
        }
    } else if (passed.mark < kNoFilter) {
        const Best best = best_of_marked(sh, block, cluster, marks, scores, passed, node.budget, out);
        if (best.found) {
            n = node.budget;
            if (best.least < kForced) {
                filter = {next_mark(passed.mark, best.least, step_of(best.n_marked, node.budget, kAim), norm) * unit,
                          best.least * unit};
            }
            if (threadIdx.x == 0 && cluster.rank() == 0) {
                atomicAdd(reinterpret_cast<unsigned long long *>(node.scratch.totals + 3), 1ull);
            }
        } else {
            guess = guess_floor(passed, best.n_marked, node.budget, kAim);
        }
    }
    if (cluster.rank() > 0) {
        return;
    }
    if (n < 0) {
        __syncthreads();
        n = select_from_peaks(sh, node.scratch.peaks + static_cast<int64_t>(query) * n_peak, n_peak, scores,
                              node.budget, guess, out);
        if (threadIdx.x == 0 && sh.floor > -FLT_MAX && sh.least < kForced && unit > 0.0f) {
            const bool  counted = sh.reached <= kHeld && sh.reached >= node.budget;
            const float step    = counted ? step_of(sh.reached, node.budget, kAim) : 0.0f;
            filter = {(counted ? next_mark(sh.floor, sh.least, step, norm) : sh.floor) * unit, sh.least * unit};
        }
    }
    if (threadIdx.x == 0) {
        node.filters[query]            = blend(before, filter);
        node.scratch.n_selected[query] = n;
        atomicAdd(reinterpret_cast<unsigned long long *>(node.scratch.totals),
                  static_cast<unsigned long long>(n_visible));
        atomicAdd(reinterpret_cast<unsigned long long *>(node.scratch.totals + 1), static_cast<unsigned long long>(n));
    }
}

template <int BLOCKS> cudaError_t launch_of(const Node & node, int n_query, const Queue & queue) {
    // Of more than a fifth of the cache, too much is gone again before it is read.
    const int64_t bytes   = queue.is_hopper ? queue.l2_bytes / 5 : 0;
    const int     callers = bytes > 0 && node.ahead[0].bytes > 0 ? kCallers / BLOCKS : 0;
    return launch_clusters(queue, BLOCKS, select_kernel<BLOCKS>,
                           dim3(static_cast<unsigned>(n_query * BLOCKS + callers)), kThreads, sizeof(Selection), true,
                           node, n_query, bytes);
}

template <int BLOCKS> cudaError_t allow_memory() {
    return cudaFuncSetAttribute(select_kernel<BLOCKS>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Selection));
}

} // namespace

cudaError_t launch_select(const Node & node, const Queue & queue) {
    const int  n_query = node.n_head * node.n_rows * node.n_stream;
    const bool both    = n_query <= queue.n_cluster && node.n_kv / kLong >= node.budget;
    return both ? launch_of<kBoth>(node, n_query, queue) : launch_of<1>(node, n_query, queue);
}

cudaError_t prepare_select(Queue * queue) {
    cudaFuncAttributes attributes = {};
    cudaError_t        error      = cudaFuncGetAttributes(&attributes, select_kernel<kBoth>);
    error                         = error == cudaSuccess ? allow_memory<1>() : error;
    queue->is_hopper              = attributes.ptxVersion >= 90;
    queue->n_cluster              = 0;
    if (error != cudaSuccess || !queue->is_hopper) {
        return error;
    }
    LaunchAttributes   in_twos(true, kBoth);
    cudaLaunchConfig_t config = {};
    config.gridDim            = dim3(kBoth);
    config.blockDim           = dim3(kThreads);
    config.dynamicSmemBytes   = sizeof(Selection);
    config.attrs              = in_twos.all + 1; // the cluster
    config.numAttrs           = 1;
    error                     = allow_memory<kBoth>();
    if (error == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&queue->n_cluster, select_kernel<kBoth>, &config) != cudaSuccess) {
        cudaGetLastError(); // a thread block each, then
        queue->n_cluster = 0;
    }
    return error;
}

} // namespace fasa::gpu
