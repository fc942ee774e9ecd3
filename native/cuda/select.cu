// select: the `budget` best cells of each query, exactly. One thread block per query, in three steps:
//   floor      the budget-th largest peak: at least that many cells reach it, so no lower cell is needed
//   candidates cells that reach the floor, in cell order, in shared memory when they fit
//   threshold  the budget-th largest candidate; cells above it are selected, and of those equal to it the first ones
// The result depends on the scores only, not on the order in which threads run.
//
// Most tokens take a shorter way to candidates. Queries of following tokens score much alike, so select leaves a filter
// for the next token, which 2.5 times the budget of cells should reach; score marks those that do, and the best of them
// are the best of all if there are enough. Else all peaks are looked at. In a short context all cells are, and those
// that reach the filter counted. The result is the same.
#include "kernels.cuh"
#include "kth.cuh"
#include "marks.cuh"
#include "peaks.cuh"
#include "short.cuh"

namespace fasa::gpu {

namespace {

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
    int    n         = -1;
    bool   by_filter = false;
    float  guess     = -CUDART_INF_F;
    Filter filter    = {kNoFilter, kNoFilter};
    if (n_visible < node.min_ctx ||
        n_visible <= node.budget) { // a row that sees few cells attends all: exact attention
        if (cluster.rank() == 0) {
            n = write_from_memory(block, scores, n_cell, -FLT_MAX, node.max_selected, out);
        }
    } else if (looks_at_all(n_cell, node.budget)) {
        if (cluster.rank() == 0) {
            n = node.budget;
            __syncthreads(); // the bins are clear
            const bool few   = n_cell <= kAll / 2 * kThreads;
            const bool known = passed.mark < kNoFilter && n_cell >= kMuch * n;
            const Best best  = !known ? Best{false, 0, 0.0f}
                               : few  ? best_of_all<kAll / 2>(sh, scores, n_cell, passed, n, out)
                                      : best_of_all<kAll>(sh, scores, n_cell, passed, n, out);
            by_filter        = best.found;
            if (best.found) {
                filter = {next_mark(passed.mark, best.least, step_of(best.n_marked, n, kAim), norm), best.least};
            } else {
                __syncthreads();
                filter = few ? select_of_all<kAll / 2>(sh, scores, n_cell, n_visible, n, out)
                             : select_of_all<kAll>(sh, scores, n_cell, n_visible, n, out);
            }
        }
    } else if (passed.mark < kNoFilter) {
        const Best best = best_of_marked(sh, block, cluster, marks, scores, passed, node.budget, out);
        by_filter       = best.found;
        if (best.found) {
            n      = node.budget;
            filter = {next_mark(passed.mark, best.least, step_of(best.n_marked, n, kAim), norm), best.least};
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
        if (threadIdx.x == 0 && sh.floor > -FLT_MAX) {
            const bool  counted = sh.reached <= kHeld && sh.reached >= node.budget;
            const float step    = counted ? step_of(sh.reached, node.budget, kAim) : 0.0f;
            filter              = {counted ? next_mark(sh.floor, sh.least, step, norm) : sh.floor, sh.least};
        }
    }
    if (threadIdx.x == 0) {
        filter              = filter.level < kForced && unit > 0.0f ? Filter{filter.mark * unit, filter.level * unit}
                                                                    : Filter{kNoFilter, kNoFilter};
        node.filters[query] = blend(before, filter);
        node.scratch.n_selected[query] = n;
        atomicAdd(reinterpret_cast<unsigned long long *>(node.scratch.totals + 3), by_filter ? 1ull : 0ull);
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
