// attend: exact softmax attention over the selected cells, K and V read in the cache's format. A head's selection is
// split over thread blocks; the last one to finish merges the parts in their order, so results do not vary.
#include <math_constants.h>

#include "kernels.cuh"
#include "query.cuh"
#include "rows.cuh"
#include "warp.cuh"

namespace fasa::gpu {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps   = kThreads / 32;
constexpr int kTile    = 128; // cells whose weights are in shared memory at once

static_assert(kTile == kThreads, "a thread per cell of a tile");
static_assert(kMaxSplits == 64, "two per lane");

struct Shared {
    float   q[FASA_MAX_HEAD_DIM];
    float   weights[kTile];
    int32_t cells[kTile];
    float   sums[kWarps][FASA_MAX_HEAD_DIM];
    float   warp[kWarps];
    bool    last;
};

__device__ float block_max(Shared & sh, float x) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) {
        sh.warp[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = fmaxf(fmaxf(sh.warp[0], sh.warp[1]), fmaxf(sh.warp[2], sh.warp[3]));
    __syncthreads();
    return x;
}

__device__ float block_sum(Shared & sh, float x) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) {
        sh.warp[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = (sh.warp[0] + sh.warp[1]) + (sh.warp[2] + sh.warp[3]);
    __syncthreads();
    return x;
}

// weights[i] = dot of q with the tile's i-th K row. LANES lanes share a row; a warp has 32 / LANES rows at a time. Rows
// of V are far apart as well: they are on their way to the L2 cache meanwhile. No load has a condition, so several are
// under way at once.
template <typename R, int LANES>
__device__ void key_pass(Shared & sh, const Rows & k, const uint8_t * rows, const Rows & v, const uint8_t * v_rows,
                         int v_bytes, int size) {
    constexpr int kRows = kWarps * 32 / LANES;
    const int     lane  = threadIdx.x % LANES;
    const int     used  = lane * kLaneDims < k.dim ? lane : 0;
    // From the row's first byte to its last one, and in no larger steps than memory has.
    const int called = lane * (v_bytes - 1) / (LANES - 1);
    float     q[kLaneDims];
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
        q[i] = used == lane ? sh.q[lane * kLaneDims + i] : 0.0f;
    }
    constexpr int kAtOnce = R::kAtOnce < kTile / kRows ? R::kAtOnce : kTile / kRows;
    for (int t0 = 0; t0 < size; t0 += kAtOnce * kRows) {
        float dots[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int64_t cell = sh.cells[t0 + j * kRows + threadIdx.x / LANES];
            float         x[kLaneDims];
            const float   unit = R::load(rows + cell * k.cell, used, x);
            dots[j]            = 0.0f;
#pragma unroll
            for (int i = 0; i < kLaneDims; ++i) {
                dots[j] = fmaf(x[i], q[i], dots[j]);
            }
            dots[j] *= unit;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            prefetch_l2(v_rows + sh.cells[t0 + j * kRows + threadIdx.x / LANES] * v.cell + called);
#pragma unroll
            for (int i = LANES / 2; i > 0; i /= 2) {
                dots[j] += __shfl_xor_sync(~0u, dots[j], i);
            }
            if (lane == 0) {
                sh.weights[t0 + j * kRows + threadIdx.x / LANES] = dots[j];
            }
        }
    }
}

// acc += weight * V over this thread's rows and dims; cells past the tile's end have weight 0.
template <typename R, int LANES>
__device__ void value_pass(const Shared & sh, const Rows & v, const uint8_t * rows, int size, float acc[kLaneDims]) {
    constexpr int kRows   = kWarps * 32 / LANES;
    const int     lane    = threadIdx.x % LANES;
    const int     used    = lane * kLaneDims < v.dim ? lane : 0;
    constexpr int kAtOnce = R::kAtOnce < kTile / kRows ? R::kAtOnce : kTile / kRows;
    for (int t0 = 0; t0 < size; t0 += kAtOnce * kRows) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int   t = t0 + j * kRows + threadIdx.x / LANES;
            float       x[kLaneDims];
            const float unit = R::load(rows + sh.cells[t] * v.cell, used, x);
            const float w    = sh.weights[t] * unit;
#pragma unroll
            for (int i = 0; i < kLaneDims; ++i) {
                acc[i] = fmaf(w, x[i], acc[i]);
            }
        }
    }
}

// Logits to weights relative to the new maximum; returns it.
__device__ float soft_max(Shared & sh, const Node & node, __half mask, int size, float m, float * sum) {
    const int t     = threadIdx.x;
    float     logit = -CUDART_INF_F;
    if (t < size) {
        const float dot = sh.weights[t] * node.scale;
        logit           = node.softcap != 0.0f ? node.softcap * tanhf(dot / node.softcap) : dot;
        logit += __half2float(mask);
    }
    const float top = fmaxf(m, block_max(sh, logit));
    // An infinite maximum means that nothing is visible so far: -inf - -inf must not be computed.
    const float weight = t < size && top > -CUDART_INF_F ? expf(logit - top) : 0.0f;
    sh.weights[t]      = weight;
    *sum               = block_sum(sh, weight);
    return top;
}

// Sums of all rows: first over the lanes of a warp that have the same dims, then over warps.
template <int LANES> __device__ void sum_rows(Shared & sh, int dim, float acc[kLaneDims]) {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
#pragma unroll
        for (int j = LANES; j < 32; j *= 2) {
            acc[i] += __shfl_xor_sync(~0u, acc[i], j);
        }
    }
    if (threadIdx.x % 32 < LANES && lane * kLaneDims < dim) {
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
            sh.sums[threadIdx.x / 32][lane * kLaneDims + i] = acc[i];
        }
    }
    __syncthreads();
}

// The parts of one query, merged in their order, by every warp for dims of its own; an attention sink adds to the
// denominator only. One thread block in many comes here, alone: few instructions, and all loads on their way at once.
__device__ void merge(const Node & node, int head, const float * parts, float * out) {
    constexpr int kAtOnce = 16;
    const int     size = 2 + node.v.dim, n = node.n_split, lane = threadIdx.x % 32;
    float         m[kMaxSplits / 32], d[kMaxSplits / 32];
    for (int i0 = 0; i0 < node.v.dim; i0 += kThreads) {
        const int     i  = i0 + static_cast<int>(threadIdx.x);
        const float * at = parts + 2 + min(i, node.v.dim - 1);
        float         x[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            x[j] = __ldcg(at + min(j, n - 1) * size);
        }
#pragma unroll
        for (int h = 0; h < kMaxSplits / 32; ++h) {
            const float * part = parts + min(lane + 32 * h, n - 1) * size;
            m[h] = __ldcg(part), d[h] = __ldcg(part + 1);
            m[h] = lane + 32 * h < n ? m[h] : -CUDART_INF_F;
        }
        const float logit = node.sinks != nullptr ? node.sinks[head] : -CUDART_INF_F;
        const float top   = fmaxf(logit, warp_max(fmaxf(m[0], m[1])));
        float       w[kMaxSplits / 32];
#pragma unroll
        for (int h = 0; h < kMaxSplits / 32; ++h) {
            w[h] = m[h] > -CUDART_INF_F ? expf(m[h] - top) : 0.0f;
        }
        const float total = warp_sum(d[0] * w[0] + d[1] * w[1]) + (logit > -CUDART_INF_F ? expf(logit - top) : 0.0f);
        float       o     = 0.0f;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            o = fmaf(x[j], __shfl_sync(~0u, w[0], j), o); // those past the last weigh nothing
        }
        for (int j = kAtOnce; j < n; ++j) {
            o = fmaf(__ldcg(at + j * size), __shfl_sync(~0u, j < 32 ? w[0] : w[1], j % 32), o);
        }
        if (i < node.v.dim) {
            out[i] = total == 0.0f ? 0.0f : o / total;
        }
    }
}

// Grid: split; KV head; stream, row and member of the group.
template <int LANES> __global__ void __launch_bounds__(kThreads, 4) attend_kernel(const Node node) {
    __shared__ Shared sh;
    const int         split = blockIdx.x;
    const Query       at    = query_of(node, blockIdx.y, blockIdx.z);
    const uint8_t *   k     = node.k.data + at.stream * node.k.stream + at.head_kv * node.k.head;
    const uint8_t *   v     = node.v.data + at.stream * node.v.stream + at.head_kv * node.v.head;
    const __half *    mask  = mask_of<__half>(node, at);
    const float *     q     = values_of(node, at);
    const int32_t *   cells = node.scratch.cells + static_cast<int64_t>(at.number) * node.max_selected;
    for (int i = threadIdx.x; i < node.k.dim; i += kThreads) {
        sh.q[i] = q[i];
    }
    wait_for_kernel_before();
    // Tiles are dealt out in turn: where they begin does not depend on n, so both loads are under way together.
    // Cells past the end repeat the tile's first one with weight 0, so that no load needs a condition.
    int        begin   = split * kTile;
    const auto cell_at = [&](int t) { return begin + t < node.max_selected ? cells[begin + t] : 0; };
    int        own = cell_at(threadIdx.x), first = cell_at(0);
    const int  n = node.scratch.n_selected[at.number], v_bytes = row_bytes(node.v);
    float      m = -CUDART_INF_F, d = 0.0f;
    float      acc[kLaneDims] = {};
    for (; begin < n; begin += node.n_split * kTile) {
        const int size = min(kTile, n - begin);
        __syncthreads();
        if (begin != split * kTile) {
            own = cell_at(threadIdx.x), first = cell_at(0);
        }
        own                   = static_cast<int>(threadIdx.x) < size ? own : first;
        sh.cells[threadIdx.x] = own;
        const __half masked   = mask[own];
        __syncthreads();
        switch (node.k.type) {
            case FASA_KV_F16: key_pass<RowF16, LANES>(sh, node.k, k, node.v, v, v_bytes, size); break;
            case FASA_KV_BF16: key_pass<RowBf16, LANES>(sh, node.k, k, node.v, v, v_bytes, size); break;
            case FASA_KV_Q8_0: key_pass<RowQ80, LANES>(sh, node.k, k, node.v, v, v_bytes, size); break;
            default: key_pass<RowQ40, LANES>(sh, node.k, k, node.v, v, v_bytes, size); break;
        }
        __syncthreads();
        float       sum;
        const float top = soft_max(sh, node, masked, size, m, &sum);
        const float old = top > -CUDART_INF_F ? expf(m - top) : 0.0f;
        m               = top;
        d               = d * old + sum;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
            acc[i] *= old;
        }
        switch (node.v.type) {
            case FASA_KV_F16: value_pass<RowF16, LANES>(sh, node.v, v, size, acc); break;
            case FASA_KV_BF16: value_pass<RowBf16, LANES>(sh, node.v, v, size, acc); break;
            case FASA_KV_Q8_0: value_pass<RowQ80, LANES>(sh, node.v, v, size, acc); break;
            default: value_pass<RowQ40, LANES>(sh, node.v, v, size, acc); break;
        }
    }
    sum_rows<LANES>(sh, node.v.dim, acc);

    const int size  = 2 + node.v.dim;
    float *   parts = node.scratch.parts + static_cast<int64_t>(at.number) * node.n_split * size;
    float *   part  = parts + split * size;
    for (int i = threadIdx.x; i < node.v.dim; i += kThreads) {
        part[2 + i] = (sh.sums[0][i] + sh.sums[1][i]) + (sh.sums[2][i] + sh.sums[3][i]);
    }
    if (threadIdx.x == 0) {
        part[0] = m, part[1] = d;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence(); // what the others wrote before the barrier included
        sh.last = atomicAdd(node.scratch.arrived + at.number, 1) == node.n_split - 1;
    }
    __syncthreads();
    if (sh.last) {
        __threadfence();
        auto * out = reinterpret_cast<float *>(reinterpret_cast<char *>(node.out) + at.row * node.out_row +
                                               at.head * node.out_head + at.stream * node.out_stream);
        merge(node, at.head, parts, out);
        if (threadIdx.x == 0) {
            node.scratch.arrived[at.number] = 0;
        }
    }
}

} // namespace

cudaError_t launch_attend(const Node & node, const Queue & queue) {
    const dim3 grid(node.n_split, node.n_head_kv, node.group * node.n_rows * node.n_stream);
    const int  dim    = node.k.dim > node.v.dim ? node.k.dim : node.v.dim;
    const auto kernel = dim <= 64 ? attend_kernel<4> : dim <= 128 ? attend_kernel<8> : attend_kernel<16>;
    return launch(queue, kernel, grid, kThreads, 0, true, node);
}

} // namespace fasa::gpu
