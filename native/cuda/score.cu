// score: every query head's dot products with the index of its KV head. A warp scores 64 cells for four queries at
// once; hidden cells get -inf in the same pass, and cells that are always selected a score above all others.
#include <climits>

#include <math_constants.h>

#include "kernels.cuh"
#include "products.cuh"
#include "warp.cuh"

namespace fasa::gpu {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps   = kThreads / 32;

// Thread blocks of a multiprocessor: as many as their registers allow.
constexpr int at_once(int bits, bool alone) { return bits == 0 ? 4 : alone ? 8 : 6; }

struct Scores { // of a lane: [query, half, cell], the second half being its cells 16 further
    float x[2][2][2];
};

// A row of the step and up to four of the KV head's query heads, as one lane needs them.
struct Pass {
    QueryCodes      codes;
    const float *   levels; // of the lane's first query
    int             mine;   // how many of the lane's two queries there are
    bool            has_peak, has_marks;
    float           thresholds[2];
    Window          window;
    const uint8_t * mask;
    float *         scores; // places of the lane's values of block 0
    float *         peaks;
    uint32_t *      marks; // lane 2 q + i has those of query q and cells from 32 i on
};

__device__ Pass pass_of(const Node & node, int number, int head_kv, int stream, const Lane & at) {
    const int     group = node.group, per_row = (group + kColumns - 1) / kColumns;
    const int     row = stream * node.n_rows + number / per_row, head = number % per_row * kColumns;
    const int     first = row * node.n_head + head_kv * group + head, n = min(kColumns, group - head);
    const int     loaded = min(at.g % kColumns, n - 1), peak = at.first_query + at.g % 2;
    const int64_t stride = n_blocks(node.n_kv) * FASA_BLOCK_CELLS;
    const int     mine   = max(0, min(2, n - at.first_query));
    const int     query = first + (mine > 0 ? at.first_query : 0), peak_query = first + min(peak, n - 1);
    const int     eight = at.pair * 4 + at.t / 2 * 2 + at.g / 2 % 2, lane = at.g * 4 + at.t;
    return {QueryCodes(node.scratch.codes + int64_t{first + loaded} * kMaxSlots, at.g % kColumns < n, at),
            node.scratch.levels + int64_t{query} * 2 * kSegments,
            mine,
            peak < n,
            lane < 2 * n,
            {node.scratch.thresholds[query].mark, node.scratch.thresholds[query + (mine > 1 ? 1 : 0)].mark},
            node.scratch.windows[row],
            node.mask + number / per_row * node.mask_row + stream * node.mask_stream,
            node.scratch.scores + query * stride + at.first_cell,
            node.scratch.peaks + peak_query * (stride / kPeak) + eight,
            node.scratch.marks + (first + min(lane / 2, n - 1)) * (stride / 32) + lane % 2};
}

// ---- scores ------------------------------------------------------------------------------------------------------

template <int BITS>
__device__ void add_sums(const uint8_t * block, const Segment & seg, const float2 levels[2], const Pass & pass,
                         const Lane & at, Scores & scores) {
    const uint8_t * steps      = block + seg.offset + at.first_cell;
    const uint32_t  raw[2]     = {__ldcs(reinterpret_cast<const uint16_t *>(steps)),
                                  __ldcs(reinterpret_cast<const uint16_t *>(steps + 16))};
    int32_t         sums[2][4] = {};
    add_products<BITS>(block + seg.offset + kStepsBytes, seg.n_quad, seg.slot, pass.codes, at, sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int   shift = code_shift<BITS>(at) + (BITS < 8 && half == 1 ? BITS : 0);
        const float unit  = __int_as_float((127 - shift) << 23);
#pragma unroll
        for (int s = 0; s < 2; ++s) { // the step of a cell is a byte (step_value of layout.h)
            const float step = __uint_as_float(((raw[half] >> (8 * s) & 0xffu) << 19) + kStepOffset);
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                const auto sum = static_cast<float>(sums[s][2 * half + q]);
                scores.x[q][half][s] += step * (levels[q].x * unit * sum - levels[q].y);
            }
        }
    }
}

// scores += step * (level * sum - bias) of each segment. BITS: of the only segment, or 0.
template <int BITS>
__device__ Scores score_block(const HeadLayout & l, const Segment & segment_0, const uint8_t * block, const Pass & pass,
                              const Lane & at) {
    Scores       scores = {};
    const auto * own    = reinterpret_cast<const float2 *>(pass.levels);
    const int    other  = pass.mine > 1 ? kSegments : 0;
    if constexpr (BITS != 0) {
        const float2 levels[2] = {own[0], own[other]};
        add_sums<BITS>(block, segment_0, levels, pass, at, scores);
    } else {
#pragma unroll 1
        for (int s = 0; s < l.n_segment; ++s) {
            const Segment seg       = l.segments[s];
            const float2  levels[2] = {own[s], own[s + other]};
            switch (seg.bits) {
                case 8: add_sums<8>(block, seg, levels, pass, at, scores); break;
                case 4: add_sums<4>(block, seg, levels, pass, at, scores); break;
                case 2: add_sums<2>(block, seg, levels, pass, at, scores); break;
                default: add_sums<1>(block, seg, levels, pass, at, scores); break;
            }
        }
    }
    return scores;
}

// ---- cells that are hidden, and cells that are always selected ---------------------------------------------------

// The mask of the lane's cells, in the usual case: it goes on for the whole block, in words. It has 0 and -inf.
__device__ uint2 mask_words(const uint8_t * mask, int first) {
    const auto * values = reinterpret_cast<const uint32_t *>(mask + 2 * first);
    return {values[0], values[8]};
}

// Hidden and forced cells get their scores; how many of the lane's cells the row sees. fresh: bits of the block's
// cells.
__device__ int mend(const Node & node, const Pass & pass, int first, uint32_t fresh, Scores & scores) {
    const auto * mask = reinterpret_cast<const uint16_t *>(pass.mask) + first;
    int          n    = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int  at      = i < 2 ? i : 14 + i;
        const bool visible = first + at < node.n_kv && mask[at] != 0xfc00;
        const bool forced =
            first + at < pass.window.first_end || first + at >= pass.window.last_begin || (fresh >> at & 1) != 0;
        n += visible ? 1 : 0;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            float & x = scores.x[q][i / 2][i % 2];
            x         = !visible ? -CUDART_INF_F : forced ? kForced : x;
        }
    }
    return n;
}

__device__ int new_cell(const Node & node, int stream, int i) {
    const int64_t first = (node.index.first_stream + stream) * node.index.n_cell;
    const int64_t cell  = i < node.n_new ? node.new_cells[i] - first : -1;
    return cell >= 0 && cell < node.n_kv ? static_cast<int>(cell) : -1;
}

// The blocks between which new cells of a stream lie: most steps have one.
struct Span {
    int first, last;
};

__device__ Span blocks_of_new_cells(const Node & node, int stream, int own, int lane) {
    uint32_t lowest = own >= 0 ? own : INT_MAX, highest = own + 1; // from 1 on
#pragma unroll 1
    for (int i = 32; i < node.n_new; i += 32) {
        const int cell = new_cell(node, stream, i + lane);
        lowest         = min(lowest, cell >= 0 ? static_cast<uint32_t>(cell) : static_cast<uint32_t>(INT_MAX));
        highest        = max(highest, static_cast<uint32_t>(cell + 1));
    }
    return {static_cast<int>(INT_MAX - warp_top(INT_MAX - lowest)) >> 6,
            (static_cast<int>(warp_top(highest)) - 1) >> 6};
}

// Those of 32 new cells that lie in a block; own: the lane's, or -1. Their entries may not be there yet.
__device__ void add_fresh(int own, int block, uint64_t & fresh) {
    for (uint32_t hits = __ballot_sync(~0u, own >> 6 == block); hits != 0; hits &= hits - 1) {
        fresh |= uint64_t{1} << (__shfl_sync(~0u, own, __ffs(static_cast<int>(hits)) - 1) % FASA_BLOCK_CELLS);
    }
}

// ---- what is stored ----------------------------------------------------------------------------------------------

// The largest of eight cells that follow each other, from the four lanes that share them. Each lane has one of 32 in
// the end: of its query g % 2, and the eight cells that Pass::peaks points to.
__device__ float peak_of(const Scores & scores, const Lane & at) {
    const bool is_low = at.t < 2, is_even = at.g % 2 == 0;
    float      kept[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        const auto & x   = scores.x[q];
        const float  low = fmaxf(x[0][0], x[0][1]), high = fmaxf(x[1][0], x[1][1]);
        const float  other = __shfl_xor_sync(~0u, is_low ? high : low, 2);
        kept[q]            = fmaxf(is_low ? low : high, other);
    }
    const float other = __shfl_xor_sync(~0u, is_even ? kept[1] : kept[0], 4);
    return fmaxf(is_even ? kept[0] : kept[1], other);
}

// A bit for each of 32 cells that reach the query's threshold, in the lane that stores them. A vote has the bits of a
// query in every other lane, in the order of every other cell.
__device__ uint32_t marks_of(const Scores & scores, const float thresholds[2], int lane) {
    const int query = lane / 2 % kColumns, shift = lane % 2 * 16 + query / 2;
    uint32_t  word = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const uint32_t first  = __ballot_sync(~0u, scores.x[0][half][s] >= thresholds[0]);
            const uint32_t second = __ballot_sync(~0u, scores.x[1][half][s] >= thresholds[1]);
            word |= ((query % 2 == 0 ? first : second) >> shift & 0x5555u) << (16 * half + s);
        }
    }
    return word;
}

__device__ void store(const Pass & pass, int block, int64_t stride, const Lane & at, int lane, const Scores & scores) {
    float * out = pass.scores + int64_t{block} * FASA_BLOCK_CELLS;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        if (q < pass.mine) {
            const auto & x                                     = scores.x[q];
            *reinterpret_cast<float2 *>(out + q * stride)      = make_float2(x[0][0], x[0][1]);
            *reinterpret_cast<float2 *>(out + q * stride + 16) = make_float2(x[1][0], x[1][1]);
        }
    }
    const float peak = peak_of(scores, at);
    if (pass.has_peak) {
        pass.peaks[block * (FASA_BLOCK_CELLS / kPeak)] = peak;
    }
    const uint32_t marks = marks_of(scores, pass.thresholds, lane);
    if (pass.has_marks) {
        pass.marks[2 * block] = marks;
    }
}

// ---- the kernel --------------------------------------------------------------------------------------------------

// All passes over a block follow each other, so that the index comes from memory once. Grid: x strides over the blocks
// of cells, a warp each at a time; KV head; stream. BITS: of all heads' only segment, or 0. ALONE: one pass is all.
template <int BITS, bool ALONE>
__global__ void __launch_bounds__(kThreads, at_once(BITS, ALONE)) score_kernel(const Node node) {
    __shared__ int     n_seen[FASA_MAX_ROWS]; // cells that each row sees
    const int          lane = threadIdx.x % 32, head_kv = blockIdx.y, stream = blockIdx.z;
    const Lane         at(lane);
    const HeadLayout & l       = node.index.heads[head_kv];
    const int          n_block = static_cast<int>(n_blocks(node.n_kv)), step = static_cast<int>(gridDim.x) * kWarps;
    const int          per_row = (node.group + kColumns - 1) / kColumns, n_pass = ALONE ? 1 : node.n_rows * per_row;
    const uint8_t *    blocks      = index_block(node.index, l, node.index.first_stream + stream, 0);
    const bool         counts      = head_kv == 0;
    const int          block_bytes = l.block_bytes;
    const Segment      segment_0   = l.segments[0];
    const int          fresh_0     = new_cell(node, stream, lane);
    const Span         new_blocks  = blocks_of_new_cells(node, stream, fresh_0, lane);
    Pass               pass        = pass_of(node, 0, head_kv, stream, at);
    if (counts) {
        if (threadIdx.x < node.n_rows) {
            n_seen[threadIdx.x] = 0;
        }
        __syncthreads();
    }
    const int begin_at = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    for (int b = begin_at; b < n_block; b += step) {
        const int begin = b * FASA_BLOCK_CELLS, end = begin + FASA_BLOCK_CELLS;
        uint64_t  fresh = 0;
        if (b >= new_blocks.first && b <= new_blocks.last) {
            add_fresh(fresh_0, b, fresh);
            for (int i = 32; i < node.n_new; i += 32) {
                add_fresh(new_cell(node, stream, i + lane), b, fresh);
            }
        }
#pragma unroll 1
        for (int p = 0; p < n_pass; ++p) {
            if (!ALONE) {
                pass = pass_of(node, p, head_kv, stream, at);
            }
            const bool words = end <= node.n_kv && (reinterpret_cast<uintptr_t>(pass.mask) & 3) == 0;
            // On its way with the codes, and looked at behind the products: these must not wait for it.
            const uint2 hidden = words ? mask_words(pass.mask, begin + at.first_cell) : make_uint2(1, 1);
            Scores      scores = score_block<BITS>(l, segment_0, blocks + int64_t{b} * block_bytes, pass, at);
            const bool  plain  = words && (hidden.x | hidden.y) == 0;
            const bool  forced = begin < pass.window.first_end || end > pass.window.last_begin || fresh != 0;
            int         n      = FASA_BLOCK_CELLS;
            if (forced || __any_sync(~0u, !plain)) {
                n = mend(node, pass, begin + at.first_cell, static_cast<uint32_t>(fresh >> at.first_cell), scores);
                n = warp_sum(at.first_query == 0 ? n : 0);
            }
            if (counts && lane == 0 && p % per_row == 0) {
                atomicAdd(n_seen + p / per_row, n);
            }
            store(pass, b, int64_t{n_block} * FASA_BLOCK_CELLS, at, lane, scores);
        }
    }
    if (counts) {
        __syncthreads();
        if (threadIdx.x < node.n_rows && n_seen[threadIdx.x] > 0) {
            atomicAdd(node.scratch.n_visible + stream * node.n_rows + threadIdx.x, n_seen[threadIdx.x]);
        }
    }
}

template <int BITS, bool ALONE> cudaError_t launch(const Node & node, cudaStream_t stream) {
    // Where they have to take turns anyway, a quarter of the device is left to llama.cpp's kernels for key and value.
    const int lists   = node.n_head_kv * node.n_stream;
    const int wanted  = static_cast<int>((n_blocks(node.n_kv) + kWarps - 1) / kWarps);
    const int most    = at_once(BITS, ALONE) * device_attribute(cudaDevAttrMultiProcessorCount) / lists;
    const int shared  = most > 1 ? most * 3 / 4 : 1;
    const int columns = wanted <= most ? wanted : shared;
    score_kernel<BITS, ALONE><<<dim3(columns, node.n_head_kv, node.n_stream), kThreads, 0, stream>>>(node);
    return cudaGetLastError();
}

} // namespace

cudaError_t launch_score(const Node & node, cudaStream_t stream) {
    const bool alone = node.n_rows == 1 && node.n_head <= kColumns * node.n_head_kv;
    switch (node.index.bits) {
        case 4: return alone ? launch<4, true>(node, stream) : launch<4, false>(node, stream);
        case 2: return alone ? launch<2, true>(node, stream) : launch<2, false>(node, stream);
        default: return alone ? launch<0, true>(node, stream) : launch<0, false>(node, stream);
    }
}

} // namespace fasa::gpu
