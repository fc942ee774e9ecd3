// score: every query head's dot products with the index of its KV head, eight cells per thread and segment quad. One
// 16-byte load serves all queries of a pass; hidden cells get -inf in the same pass.
#include <cuda_fp16.h>
#include <math_constants.h>

#include "kernels.cuh"
#include "rows.cuh"

namespace fasa::gpu {

namespace {

constexpr int   kThreads      = 128;
constexpr float kMaxScore     = 3.0e38f;
constexpr int   kBlockThreads = 8; // per block of 64 cells
constexpr int   kBlocks       = kThreads / kBlockThreads;
constexpr int   kCells        = 8; // of a thread: 4 from cell `low`, 4 from cell `low` + 16

// The eight cells of a thread in a block: `pair` says which 32 cells, `column` which 16 bytes of a group of 16 cells.
struct Place {
    int column, pair;
};

// Where the n-th of a thread's 16-byte loads lies, from the start of the quads.
template <int BITS> __device__ int chunk_offset(int n, Place at) {
    if constexpr (BITS == 8) { // two per quad
        return n / 2 * 256 + at.pair * 128 + n % 2 * 64 + at.column * 16;
    } else if constexpr (BITS == 1) { // one per two quads
        return n / 2 * 64 + at.column * 16;
    } else {
        return n * 32 * BITS + (BITS == 4 ? at.pair * 64 : 0) + at.column * 16;
    }
}

// The index is read once per token and layer: it must not push the scores out of the L2 cache.
struct FromMemory {
    const uint8_t * quads;
    Place           at;

    template <int BITS> __device__ uint4 load(int n) const {
        return __ldcs(reinterpret_cast<const uint4 *>(quads + chunk_offset<BITS>(n, at)));
    }
};

// sums[query][cell] += codes of one segment.
template <int BITS, int N>
__device__ void add_segment(const FromMemory & source, int n_quad, const int32_t * q, Place at,
                            int32_t sums[N][kCells]) {
#pragma unroll 4
    for (int quad = 0; quad < n_quad; ++quad) {
        uint32_t low[4], high[4]; // codes of cells low + i and low + 16 + i, one dim per byte
        if constexpr (BITS == 8) {
            const uint4 a = source.load<8>(2 * quad), b = source.load<8>(2 * quad + 1);
            low[0] = a.x, low[1] = a.y, low[2] = a.z, low[3] = a.w;
            high[0] = b.x, high[1] = b.y, high[2] = b.z, high[3] = b.w;
        } else {
            constexpr uint32_t kField = BITS == 4 ? 0x0f0f0f0fu : BITS == 2 ? 0x03030303u : 0x01010101u;
            const uint4        a      = source.load<BITS>(quad);
            const uint32_t     w[4]   = {a.x, a.y, a.z, a.w};
            const int          shift  = BITS == 4 ? 0 : BITS == 2 ? at.pair * 4 : quad % 2 * 4 + at.pair * 2;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                low[i]  = w[i] >> shift & kField;
                high[i] = w[i] >> (shift + BITS) & kField;
            }
        }
#pragma unroll
        for (int h = 0; h < N; ++h) {
            const int32_t codes = q[quad * N + h];
#pragma unroll
            for (int i = 0; i < 4; ++i) { // index codes are unsigned, query codes signed
                asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sums[h][i]) : "r"(low[i]), "r"(codes));
                asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sums[h][4 + i]) : "r"(high[i]), "r"(codes));
            }
        }
    }
}

struct Queries {            // of one pass, in shared memory
    const int32_t * codes;  // [N, quad]
    const float *   levels; // [2 * kSegments, N]
};

// raw: the steps of the cells, a byte each (step_value of layout.h). scores += step * (level * sum - bias).
template <int N>
__device__ void add_scores(const uint32_t raw[2], const float * levels, int segment, const int32_t sums[N][kCells],
                           float scores[N][kCells]) {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
        const float step = __uint_as_float(((raw[i / 4] >> (i % 4 * 8) & 0xffu) << 19) + kStepOffset);
#pragma unroll
        for (int h = 0; h < N; ++h) {
            const float * level = levels + h * 2 * kSegments + 2 * segment;
            scores[h][i] += step * (level[0] * static_cast<float>(sums[h][i]) - level[1]);
        }
    }
}

template <int N>
__device__ void score_segment(const FromMemory & source, const uint32_t steps[2], const Segment & seg, int s,
                              const Queries & queries, Place at, float scores[N][kCells]) {
    const int32_t * q               = queries.codes + seg.slot / 4 * N;
    int32_t         sums[N][kCells] = {};
    switch (seg.bits) {
        case 8: add_segment<8, N>(source, seg.n_quad, q, at, sums); break;
        case 4: add_segment<4, N>(source, seg.n_quad, q, at, sums); break;
        case 2: add_segment<2, N>(source, seg.n_quad, q, at, sums); break;
        default: add_segment<1, N>(source, seg.n_quad, q, at, sums); break;
    }
    add_scores<N>(steps, queries.levels, s, sums, scores);
}

template <int N>
__device__ void score_block(const HeadLayout & l, const uint8_t * block, const Queries & queries, Place at,
                            float scores[N][kCells]) {
    for (int s = 0; s < l.n_segment; ++s) {
        const Segment   seg    = l.segments[s];
        const uint8_t * steps  = block + seg.offset + at.pair * 32 + at.column * 4;
        const uint32_t  raw[2] = {__ldcs(reinterpret_cast<const uint32_t *>(steps)),
                                  __ldcs(reinterpret_cast<const uint32_t *>(steps + 16))};
        score_segment<N>(FromMemory{block + seg.offset + kStepsBytes, at}, raw, seg, s, queries, at, scores);
    }
}

__device__ int warp_count(uint32_t bits) {
    int n = __popc(bits);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        n += __shfl_xor_sync(~0u, n, i);
    }
    return n;
}

// Cells that the row sees, bit i for cell i of the thread's eight.
__device__ uint32_t visible_bits(const uint8_t * mask, int64_t first, int n_kv) {
    const auto * values = reinterpret_cast<const uint16_t *>(mask) + first;
    uint32_t     bits   = 0;
    if (first + 20 <= n_kv && (reinterpret_cast<uintptr_t>(values) & 7) == 0) {
        const uint2    a = *reinterpret_cast<const uint2 *>(values), b = *reinterpret_cast<const uint2 *>(values + 16);
        const uint32_t words[4] = {a.x, a.y, b.x, b.y};
#pragma unroll
        for (int i = 0; i < kCells; ++i) {
            bits |= (words[i / 2] >> (i % 2 * 16) & 0xffff) != 0xfc00 ? 1u << i : 0u;
        }
        return bits;
    }
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
        const int at = i < 4 ? i : 12 + i;
        bits |= first + at < n_kv && values[at] != 0xfc00 ? 1u << i : 0u;
    }
    return bits;
}

// A bit for each of 32 cells that reach the threshold, from the four lanes that share them.
__device__ uint32_t marks_of(const float x[kCells], float threshold) {
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
        own |= x[i] >= threshold ? 1u << (i < 4 ? i : 12 + i) : 0u;
    }
    own <<= threadIdx.x % 4 * 4;
    own |= __shfl_xor_sync(~0u, own, 1);
    return own | __shfl_xor_sync(~0u, own, 2);
}

// Cells that this step writes, of one stream. Their entries may not be there yet.
struct Fresh {
    int count;
    int cells[kFresh];
};

__device__ void list_fresh(const Node & node, int stream, Fresh & fresh) {
    const int64_t first = (node.index.first_stream + stream) * node.index.n_cell;
    if (threadIdx.x == 0) {
        fresh.count = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < node.n_new; i += kThreads) {
        const int64_t cell = node.new_cells[i] - first;
        if (cell >= 0 && cell < node.n_kv) {
            const int at = atomicAdd(&fresh.count, 1);
            if (at < kFresh) {
                fresh.cells[at] = static_cast<int>(cell);
            }
        }
    }
    __syncthreads();
}

// Bit i: the thread's cell i is one of them.
__device__ uint32_t fresh_bits(const Fresh & fresh, int first) {
    uint32_t bits = 0;
    for (int i = 0; i < min(fresh.count, kFresh); ++i) {
        const uint32_t at = static_cast<uint32_t>(fresh.cells[i] - first);
        bits |= at < 20 ? (1u << at & 0xfu) | (1u << at >> 12 & 0xf0u) : 0u;
    }
    return bits;
}

// All lanes come here, for the shuffle; those past the last block store nothing.
__device__ void store(const Node & node, int query, int64_t first, uint32_t visible, uint32_t fresh,
                      const Window & window, const float scores[kCells], bool inside, float threshold) {
    const int64_t stride = n_blocks(node.n_kv) * FASA_BLOCK_CELLS;
    float *       out    = node.scratch.scores + query * stride + first;
    float *       peaks  = node.scratch.peaks + query * (stride / kPeak) + first / kPeak;
    float         all[kCells];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float * x = all + 4 * half;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // NaN would be neither above nor below any threshold; FLT_MAX is the score of forced cells.
            const float score = scores[4 * half + i];
            const float value = score > -kMaxScore ? fminf(score, kMaxScore) : -kMaxScore;
            const int   cell  = static_cast<int>(first) + 16 * half + i;
            const bool  forced =
                cell < window.first_end || cell >= window.last_begin || (fresh >> (4 * half + i) & 1u) != 0;
            const float given = forced ? kForced : value;
            x[i]              = (visible >> (4 * half + i) & 1u) != 0 ? given : -CUDART_INF_F;
        }
        if (inside) {
            *reinterpret_cast<float4 *>(out + 16 * half) = make_float4(x[0], x[1], x[2], x[3]);
        }
        float peak = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1)); // the neighbour has the other four of these eight cells
        if (inside && threadIdx.x % 2 == 0) {
            peaks[2 * half] = peak;
        }
    }
    const uint32_t marks = marks_of(all, threshold);
    if (inside && threadIdx.x % 4 == 0) {
        node.scratch.marks[(query * stride + first) / 32] = marks;
    }
}

constexpr int kPasses = 8; // whose codes are in shared memory at once

// A pass is a row and up to N of the KV head's query heads; all passes over a block follow each other, so that the
// index comes from memory once. Grid: x strides over the blocks of cells, 16 at a time; KV head; stream.
template <int N> __global__ void __launch_bounds__(kThreads, 4) score_kernel(const Node node, int passes) {
    extern __shared__ int32_t codes[]; // [N, n_slot / 4, pass]
    __shared__ float          levels[kPasses][N * 2 * kSegments], thresholds[kPasses][N];
    __shared__ Fresh          fresh;

    const int          head_kv = blockIdx.y, stream = blockIdx.z;
    const HeadLayout & l     = node.index.heads[head_kv];
    const int          group = node.n_head / node.n_head_kv, per_row = (group + N - 1) / N;
    const Place        at     = {static_cast<int>(threadIdx.x) % 4, static_cast<int>(threadIdx.x) / 4 % 2};
    const int          n_quad = l.n_slot / 4, n_block = static_cast<int>(n_blocks(node.n_kv));
    const int          n_pass      = node.n_rows * per_row;
    const auto         first_query = [&](int pass) {
        return (stream * node.n_rows + pass / per_row) * node.n_head + head_kv * group + pass % per_row * N;
    };
    const auto block_of = [&](int b) {
        return index_block(node.index, l, node.index.first_stream + stream, b < n_block ? b : 0);
    };
    list_fresh(node, stream, fresh);
    for (int p0 = 0; p0 < n_pass; p0 += passes) {
        const int size = min(passes, n_pass - p0);
        __syncthreads();
        for (int i = threadIdx.x; i < size * N * n_quad; i += kThreads) {
            const int  quad = i % n_quad, h = i / n_quad % N, p = i / n_quad / N;
            const bool used = (p0 + p) % per_row * N + h < group;
            codes[(p * n_quad + quad) * N + h] =
                used ? reinterpret_cast<const int32_t *>(
                           node.scratch.codes + static_cast<int64_t>(first_query(p0 + p) + h) * kMaxSlots)[quad]
                     : 0;
        }
        for (int i = threadIdx.x; i < size * N; i += kThreads) {
            const bool used          = (p0 + i / N) % per_row * N + i % N < group;
            thresholds[i / N][i % N] = used ? node.scratch.thresholds[first_query(p0 + i / N) + i % N] : CUDART_INF_F;
        }
        for (int i = threadIdx.x; i < size * N * 2 * kSegments; i += kThreads) {
            const int  p = i / (N * 2 * kSegments), at_level = i % (N * 2 * kSegments), h = at_level / (2 * kSegments);
            const bool used = (p0 + p) % per_row * N + h < group;
            levels[p][at_level] =
                used ? node.scratch.levels[static_cast<int64_t>(first_query(p0 + p)) * 2 * kSegments + at_level] : 0.0f;
        }
        __syncthreads();
        for (int b0 = blockIdx.x * kBlocks; b0 < n_block; b0 += gridDim.x * kBlocks) {
            const int     b      = b0 + threadIdx.x / kBlockThreads;
            const bool    inside = b < n_block; // the others only keep the warp complete
            const int64_t first  = static_cast<int64_t>(b) * FASA_BLOCK_CELLS + at.pair * 32 + at.column * 4;
            const auto    is_new = fresh_bits(fresh, static_cast<int>(first));
            for (int p = 0; p < size; ++p) {
                const int       row = (p0 + p) / per_row, h0 = (p0 + p) % per_row * N;
                const uint8_t * mask    = node.mask + row * node.mask_row + stream * node.mask_stream;
                const Window    window  = node.scratch.windows[stream * node.n_rows + row];
                const uint32_t  visible = inside ? visible_bits(mask, first, node.n_kv) : 0;
                if (head_kv == 0 && h0 == 0) {
                    const int n = warp_count(visible);
                    if (threadIdx.x % 32 == 0 && n > 0) {
                        atomicAdd(node.scratch.n_visible + stream * node.n_rows + row, n);
                    }
                }
                float         scores[N][kCells] = {};
                const Queries queries           = {codes + p * n_quad * N, levels[p]};
                score_block<N>(l, block_of(b), queries, at, scores);
#pragma unroll
                for (int h = 0; h < N; ++h) {
                    if (h0 + h < group) {
                        store(node, first_query(p0 + p) + h, first, visible, is_new, window, scores[h], inside,
                              thresholds[p][h]);
                    }
                }
            }
        }
    }
}

template <int N> cudaError_t launch(const Node & node, cudaStream_t stream) {
    // As many thread blocks as run at once: each loads the queries once.
    const int most    = 4 * device_attribute(cudaDevAttrMultiProcessorCount);
    const int lists   = node.n_head_kv * node.n_stream;
    const int wanted  = static_cast<int>((n_blocks(node.n_kv) + kBlocks - 1) / kBlocks);
    const int columns = wanted < most / lists ? wanted : most / lists > 0 ? most / lists : 1;
    const int n_pass  = node.n_rows * ((node.n_head / node.n_head_kv + N - 1) / N);
    const int passes  = n_pass < kPasses ? n_pass : kPasses;
    score_kernel<N><<<dim3(columns, node.n_head_kv, node.n_stream), kThreads,
                      static_cast<size_t>(passes) * N * kMaxSlots, stream>>>(node, passes);
    return cudaGetLastError();
}

} // namespace

cudaError_t launch_score(const Node & node, cudaStream_t stream) {
    const int group = node.n_head / node.n_head_kv;
    return group == 1 ? launch<1>(node, stream) : group == 2 ? launch<2>(node, stream) : launch<4>(node, stream);
}

} // namespace fasa::gpu
