// score: every query head's dot products with the index of its KV head. A warp scores 64 cells for four queries at
// once; hidden cells get -inf in the same pass, and cells that are always selected a score above all others.
#include <math_constants.h>

#include "kernels.cuh"
#include "scores.cuh"
#include "warp.cuh"

namespace fasa::gpu {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps   = kThreads / 32;

// Thread blocks of a multiprocessor: as many as their registers allow.
constexpr int at_once(int bits) { return bits == 0 ? 4 : 6; }

// A value that has been here stays in its register: addresses and the like are otherwise reckoned anew for every block,
// which was half of all instructions.
template <typename T> __device__ T pinned(T x) {
    if constexpr (sizeof(T) == 8) {
        asm volatile("" : "+l"(x));
    } else {
        asm volatile("" : "+r"(x));
    }
    return x;
}

__device__ inline float pinned(float x) { return __uint_as_float(pinned(__float_as_uint(x))); }

// A row of the step and up to four of the KV head's query heads, as one lane needs them.
struct Pass {
    QueryCodes    codes;
    const float * levels; // of the lane's first query
    int           mine;   // how many of the lane's two queries there are
    bool          has_peak, has_marks;
    float         thresholds[2];
    Window        window;
    uint32_t      mask;   // bytes from the first row's to what the lane has of block 0
    uint32_t      scores; // where the lane's values of block 0 are, of all scores
    uint32_t      peaks;
    uint32_t      marks; // lane 2 q + i has those of query q and cells from 32 i on
};

__device__ Pass pass_of(const Node & node, int number, int head_kv, int stream, const Lane & at) {
    const int  group = node.group, per_row = (group + kColumns - 1) / kColumns;
    const int  row = stream * node.n_rows + number / per_row, head = number % per_row * kColumns;
    const int  first = row * node.n_head + head_kv * group + head, n = min(kColumns, group - head);
    const int  loaded = min(at.g % kColumns, n - 1), peak = at.first_query + at.g % 2;
    const auto n_block = static_cast<uint32_t>(n_blocks(node.n_kv));
    const int  mine    = max(0, min(2, n - at.first_query));
    const int  query = first + (mine > 0 ? at.first_query : 0), peak_query = first + min(peak, n - 1);
    const int  eight = at.pair * 4 + at.t / 2 * 2 + at.g / 2 % 2, lane = at.g * 4 + at.t;
    return {QueryCodes(node.scratch.codes + int64_t{first + loaded} * kMaxSlots, at.g % kColumns < n, at),
            node.scratch.levels + int64_t{query} * 2 * kSegments,
            mine,
            peak < n,
            lane < 2 * n,
            {node.scratch.thresholds[query].mark, node.scratch.thresholds[query + (mine > 1 ? 1 : 0)].mark},
            node.scratch.windows[row],
            static_cast<uint32_t>(number / per_row * node.mask_row + stream * node.mask_stream) + 2 * at.first_cell,
            query * n_block * FASA_BLOCK_CELLS + at.first_cell,
            peak_query * n_block * (FASA_BLOCK_CELLS / kPeak) + eight,
            (first + min(lane / 2, n - 1)) * n_block * (FASA_BLOCK_CELLS / 32) + lane % 2};
}

// ---- scores ------------------------------------------------------------------------------------------------------

template <int BITS>
__device__ void add_sums(const uint8_t * block, const Segment & seg, const float2 levels[2], const Pass & pass,
                         const Lane & at, Scores & scores) {
    const uint8_t * first      = block + seg.offset + at.first_cell;
    const uint32_t  steps[2]   = {steps_at(first), steps_at(first + 16)};
    int32_t         sums[2][4] = {};
    add_products<BITS>(block + seg.offset + kStepsBytes, seg.n_quad, seg.slot, pass.codes, at, sums);
    add_scaled<BITS>(sums, steps, levels, at, scores);
}

// All segments of a block. BITS: of the only segment, or 0.
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

// The mask of the lane's cells; it has 0 and -inf. Not looked at, as if some were hidden, where it ends in the block or
// does not lie at words.
__device__ uint2 mask_words(const Node & node, uint32_t offset, int block) {
    const uint8_t * mask  = node.mask + (offset + 2 * block * FASA_BLOCK_CELLS);
    const auto *    words = reinterpret_cast<const uint32_t *>(mask);
    const bool      may   = (block + 1) * FASA_BLOCK_CELLS <= node.n_kv && (reinterpret_cast<uintptr_t>(mask) & 3) == 0;
    return may ? make_uint2(words[0], words[8]) : make_uint2(1, 1);
}

// Hidden and forced cells get their scores; how many of the lane's cells the row sees. fresh: bits of the block's
// cells.
__device__ int mend(const Node & node, const Window & window, const uint8_t * own_mask, int first, uint32_t fresh,
                    Scores & scores) {
    const auto * mask = reinterpret_cast<const uint16_t *>(own_mask);
    int          n    = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int  at      = i < 2 ? i : 14 + i;
        const bool visible = first + at < node.n_kv && mask[at] != 0xfc00;
        const bool forced  = first + at < window.first_end || first + at >= window.last_begin || (fresh >> at & 1) != 0;
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
    uint32_t lowest = static_cast<uint32_t>(own), highest = static_cast<uint32_t>(own + 1); // none: the top, and 0
#pragma unroll 1
    for (int i = 32; i < node.n_new; i += 32) {
        const int cell = new_cell(node, stream, i + lane);
        lowest         = min(lowest, static_cast<uint32_t>(cell));
        highest        = max(highest, static_cast<uint32_t>(cell + 1));
    }
    return {static_cast<int>(~warp_top(~lowest)) >> 6, (static_cast<int>(warp_top(highest)) - 1) >> 6};
}

// Those of 32 new cells that lie in a block; own: the lane's, or -1. Their entries may not be there yet.
__device__ void add_fresh(int own, int block, uint64_t & fresh) {
    for (uint32_t hits = __ballot_sync(~0u, own >> 6 == block); hits != 0; hits &= hits - 1) {
        fresh |= uint64_t{1} << (__shfl_sync(~0u, own, __ffs(static_cast<int>(hits)) - 1) % FASA_BLOCK_CELLS);
    }
}

// ---- what is stored ----------------------------------------------------------------------------------------------

__device__ void store(const Node & node, const Pass & pass, int block, uint32_t stride, const Lane & at, int lane,
                      const Scores & scores) {
    const uint32_t to = pass.scores + block * FASA_BLOCK_CELLS;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        if (q < pass.mine) {
            const auto & x                        = scores.x[q];
            float *      out                      = node.scratch.scores + (to + q * stride);
            *reinterpret_cast<float2 *>(out)      = make_float2(x[0][0], x[0][1]);
            *reinterpret_cast<float2 *>(out + 16) = make_float2(x[1][0], x[1][1]);
        }
    }
    const float peak = peak_of(scores, at);
    if (pass.has_peak) {
        node.scratch.peaks[pass.peaks + block * (FASA_BLOCK_CELLS / kPeak)] = peak;
    }
    const uint32_t marks = marks_of(scores, pass.thresholds, lane);
    if (pass.has_marks) {
        node.scratch.marks[pass.marks + block * (FASA_BLOCK_CELLS / 32)] = marks;
    }
}

// ---- the kernel --------------------------------------------------------------------------------------------------

// What a warp knows before it begins.
struct Task {
    int  lane, head_kv, stream, first, step, n_block; // blocks first, first + step, ...
    int  fresh;                                       // the lane's new cell, or -1
    Span new_blocks;
};

// New cells that lie in a block, a bit each.
__device__ uint64_t fresh_of(const Node & node, const Task & task, int block) {
    uint64_t fresh = 0;
    if (block >= task.new_blocks.first && block <= task.new_blocks.last) {
        add_fresh(task.fresh, block, fresh);
        for (int i = 32; i < node.n_new; i += 32) {
            add_fresh(new_cell(node, task.stream, i + task.lane), block, fresh);
        }
    }
    return fresh;
}

// What hides and forces cells of a block is done to their scores, and these are stored; how many the row sees.
__device__ int finish_block(const Node & node, const Task & task, const Pass & pass, int block, uint64_t fresh,
                            const uint2 & hidden, const Lane & at, Scores & scores) {
    const int  begin = block * FASA_BLOCK_CELLS, end = begin + FASA_BLOCK_CELLS;
    const bool forced = begin < pass.window.first_end || end > pass.window.last_begin || fresh != 0;
    int        n      = FASA_BLOCK_CELLS;
    if (forced || __any_sync(~0u, (hidden.x | hidden.y) != 0)) {
        n = mend(node, pass.window, node.mask + (pass.mask + 2 * begin), begin + at.first_cell,
                 static_cast<uint32_t>(fresh >> at.first_cell), scores);
        n = warp_sum(at.first_query == 0 ? n : 0);
    }
    store(node, pass, block, static_cast<uint32_t>(task.n_block) * FASA_BLOCK_CELLS, at, task.lane, scores);
    return n;
}

// All passes over a block follow each other, so that the index comes from memory once.
template <int BITS, bool ALONE>
__device__ void score_blocks(const Node & node, const Task & task, const HeadLayout & l, const uint8_t * blocks,
                             const Lane & at, int * n_seen) {
    const int     per_row = (node.group + kColumns - 1) / kColumns, n_pass = ALONE ? 1 : node.n_rows * per_row;
    const Segment segment_0 = l.segments[0];
    Pass          pass      = pass_of(node, 0, task.head_kv, task.stream, at);
#pragma unroll 1
    for (int b = task.first; b < task.n_block; b += task.step) {
        const uint64_t fresh = fresh_of(node, task, b);
#pragma unroll 1
        for (int p = 0; p < n_pass; ++p) {
            if (!ALONE) {
                pass = pass_of(node, p, task.head_kv, task.stream, at);
            }
            // On its way with the codes, and looked at behind the products: these must not wait for it.
            const uint2 hidden = mask_words(node, pass.mask, b);
            Scores      scores = score_block<BITS>(l, segment_0, blocks + int64_t{b} * l.block_bytes, pass, at);
            const int   n      = finish_block(node, task, pass, b, fresh, hidden, at, scores);
            if (task.head_kv == 0 && task.lane == 0 && p % per_row == 0) {
                atomicAdd(n_seen + p / per_row, n);
            }
        }
    }
}

// The usual case, one pass over one segment of 4 LOADS quads: what does not change from block to block is kept in
// registers.
template <int BITS, int LOADS>
__device__ void score_plain(const Node & node, const Task & task, const HeadLayout & l, const uint8_t * blocks,
                            const Lane & at, int * n_seen) {
    Pass            pass      = pass_of(node, 0, task.head_kv, task.stream, at);
    const Segment & seg       = l.segments[0];
    const auto *    own       = reinterpret_cast<const float2 *>(pass.levels);
    float2          levels[2] = {own[0], own[pass.mine > 1 ? kSegments : 0]};
    int32_t         codes[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
        codes[j] = pinned(pass.codes.quads[seg.slot / 4 + 4 * j]);
    }
    const uint8_t * quads =
        blocks + int64_t{task.first} * l.block_bytes + seg.offset + kStepsBytes + lane_offset<BITS>(at);
    const int to_steps   = pinned(at.first_cell - kStepsBytes - lane_offset<BITS>(at));
    const int step_bytes = pinned(task.step * l.block_bytes);
    quads                = pinned(quads);
    pass.mask            = pinned(pass.mask);
    pass.scores = pinned(pass.scores), pass.peaks = pinned(pass.peaks), pass.marks = pinned(pass.marks);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        levels[q] = {pinned(levels[q].x), pinned(levels[q].y)};
    }
    int n = 0;
#pragma unroll 1
    for (int b = task.first; b < task.n_block; b += task.step) {
        Chunk<BITS> chunks[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; ++j) { // all on their way at once
            chunks[j].load(quads + j * 128 * BITS);
        }
        const uint32_t steps[2]   = {steps_at(quads + to_steps), steps_at(quads + to_steps + 16)};
        const uint2    hidden     = mask_words(node, pass.mask, b);
        const uint64_t fresh      = fresh_of(node, task, b);
        int32_t        sums[2][4] = {};
        Scores         scores     = {};
        multiply_chunks<BITS, LOADS>(chunks, codes, pass.codes, at, sums);
        add_scaled<BITS>(sums, steps, levels, at, scores);
        n += finish_block(node, task, pass, b, fresh, hidden, at, scores);
        quads += step_bytes;
    }
    if (task.head_kv == 0 && task.lane == 0) {
        atomicAdd(n_seen, n);
    }
}

template <int BITS, bool ALONE>
__device__ void score_task(const Node & node, const Task & task, const HeadLayout & l, const uint8_t * blocks,
                           const Lane & at, int * n_seen) {
    if constexpr (ALONE && BITS != 0) {
        if (l.segments[0].n_quad == 16) {
            score_plain<BITS, 4>(node, task, l, blocks, at, n_seen);
            return;
        }
        if (l.segments[0].n_quad == 8) {
            score_plain<BITS, 2>(node, task, l, blocks, at, n_seen);
            return;
        }
    }
    score_blocks<BITS, ALONE>(node, task, l, blocks, at, n_seen);
}

// Grid: x strides over the blocks of cells, a warp each at a time; KV head; stream. BITS: of all heads' only segment,
// or 0. ALONE: one pass is all.
template <int BITS, bool ALONE>
__global__ void __launch_bounds__(kThreads, at_once(BITS)) score_kernel(const Node node) {
    __shared__ int     n_seen[FASA_MAX_ROWS]; // cells that each row sees
    const int          lane   = threadIdx.x % 32;
    Task               task   = {lane,
                                 static_cast<int>(blockIdx.y),
                                 static_cast<int>(blockIdx.z),
                                 static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32,
                                 static_cast<int>(gridDim.x) * kWarps,
                                 static_cast<int>(n_blocks(node.n_kv)),
                                 new_cell(node, blockIdx.z, lane),
                                 {}};
    const HeadLayout & l      = node.index.heads[task.head_kv];
    const uint8_t *    blocks = index_block(node.index, l, node.index.first_stream + task.stream, 0);
    const Lane         at(lane);
    task.new_blocks = blocks_of_new_cells(node, task.stream, task.fresh, lane);
    if (task.head_kv == 0) {
        if (threadIdx.x < node.n_rows) {
            n_seen[threadIdx.x] = 0;
        }
        __syncthreads();
    }
    wait_for_kernel_before();
    let_kernel_behind_begin();
    score_task<BITS, ALONE>(node, task, l, blocks, at, n_seen);
    if (task.head_kv == 0) {
        __syncthreads();
        if (threadIdx.x < node.n_rows && n_seen[threadIdx.x] > 0) {
            atomicAdd(node.scratch.n_visible + task.stream * node.n_rows + threadIdx.x, n_seen[threadIdx.x]);
        }
    }
}

template <int BITS, bool ALONE> cudaError_t launch_of(const Node & node, const Queue & queue) {
    // Where they have to take turns anyway, a quarter of the device is left to llama.cpp's kernels for key and value.
    const int lists   = node.n_head_kv * node.n_stream;
    const int wanted  = static_cast<int>((n_blocks(node.n_kv) + kWarps - 1) / kWarps);
    const int most    = at_once(BITS) * queue.n_multiprocessor / lists;
    const int shared  = most > 1 ? most * 3 / 4 : 1;
    const int columns = wanted <= most ? wanted : shared;
    return launch(queue, score_kernel<BITS, ALONE>, dim3(columns, node.n_head_kv, node.n_stream), kThreads, 0, true,
                  node);
}

} // namespace

cudaError_t launch_score(const Node & node, const Queue & queue) {
    const bool alone = node.n_rows == 1 && node.n_head <= kColumns * node.n_head_kv;
    switch (node.index.bits) {
        case 4: return alone ? launch_of<4, true>(node, queue) : launch_of<4, false>(node, queue);
        case 2: return alone ? launch_of<2, true>(node, queue) : launch_of<2, false>(node, queue);
        default: return alone ? launch_of<0, true>(node, queue) : launch_of<0, false>(node, queue);
    }
}

} // namespace fasa::gpu
