// index: keys of the cache as entries of the side index (Layout::write of layout.cpp), all of a layer or those of the
// step's new cells, and the first phase of a node: codes of its queries.
#include <cfloat>

#include <math_constants.h>

#include "kernels.cuh"
#include "query.cuh"
#include "rows.cuh"
#include "warp.cuh"

namespace fasa::gpu {

namespace {

constexpr int kWarp  = 32;
constexpr int kWarps = 4; // per thread block, one cell or query each

constexpr float kMaxLevel = 1e28f; // of a query's codes

// The nearest step of a byte, or the least that is not below (step_code and quantize_finely of layout.cpp).
__device__ uint32_t step_code(float step, bool up) {
    const uint32_t bits = __float_as_uint(fminf(fmaxf(step, kStepMin), kStepMax)) - kStepOffset;
    return min((bits + (up ? (1u << 19) - 1 : 1u << 18)) >> 19, 255u);
}

__device__ float step_value(uint32_t code) { return __uint_as_float((code << 19) + kStepOffset); }

// A row of up to 32 * OWN numbers in a warp's registers: number 32 i + lane is x[i]. The butterflies of hadamard.h;
// which of them come first in a stage does not matter.
template <int OWN> struct WarpRow {
    float x[OWN];

    __device__ void undo_rotation(int dim, int block, int lane) {
        const int n = dim / block * block;
#pragma unroll
        for (int half = 1; half < kWarp; half *= 2) {
            if (half < block) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const float other = __shfl_xor_sync(~0u, x[i], half);
                    const float sum   = (lane & half) != 0 ? other - x[i] : x[i] + other;
                    x[i]              = i * kWarp + lane < n ? sum : x[i];
                }
            }
        }
#pragma unroll
        for (int half = 1; half < OWN; half *= 2) {
            if (half * kWarp < block) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    if ((i & half) == 0 && i * kWarp < n) {
                        const float a = x[i], b = x[i + half];
                        x[i]        = a + b;
                        x[i + half] = a - b;
                    }
                }
            }
        }
        const float norm = 1.0f / sqrtf(static_cast<float>(block));
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            x[i] = i * kWarp + lane < n ? x[i] * norm : x[i];
        }
    }
};

template <int OWN> __device__ void copy_without_rotation(const float * from, float * to, int dim, int block, int lane) {
    WarpRow<OWN> row;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        row.x[i] = i * kWarp + lane < dim ? from[i * kWarp + lane] : 0.0f;
    }
    if (block != 0) {
        row.undo_rotation(dim, block, lane);
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        if (i * kWarp + lane < dim) {
            to[i * kWarp + lane] = row.x[i];
        }
    }
    __syncwarp();
}

// One row by one warp, into shared memory; both may be the same.
__device__ void undo_rotation(const float * from, float * to, int dim, int block, int lane) {
    if (dim <= FASA_MAX_HEAD_DIM / 2) {
        copy_without_rotation<FASA_MAX_HEAD_DIM / 2 / kWarp>(from, to, dim, block, lane);
    } else {
        copy_without_rotation<FASA_MAX_HEAD_DIM / kWarp>(from, to, dim, block, lane);
    }
}

__device__ void read_key(const Rows & k, const uint8_t * row, int rotation, float * key, int lane) {
    for (int i = lane; i < k.dim / kLaneDims; i += kWarp) {
        load_lane(k.type, row, i, key + i * kLaneDims);
    }
    __syncwarp();
    if (rotation != 0) {
        undo_rotation(key, key, k.dim, rotation, lane);
    }
}

// Neighbours of the cell share its words and may be written by other warps at the same time.
__device__ void put_bits(uint32_t * word, uint32_t mask, uint32_t bits, bool zeroed) {
    if (!zeroed) {
        atomicAnd(word, ~mask);
    }
    atomicOr(word, bits);
}

// One cell of a block by one warp. A lane owns the quads lane, lane + 32, ...
__device__ void write_cell(const HeadLayout & l, const float * key, uint32_t * block, int cell, bool zeroed, int lane) {
    for (int s = 0; s < l.n_segment; ++s) {
        const Segment seg    = l.segments[s];
        const int     n      = 4 * seg.n_quad;
        const float   top    = static_cast<float>((1 << seg.bits) - 1);
        const float   middle = 0.5f * top;
        float         peak = 0.0f, square = 0.0f, used = 0.0f;
        for (int i = lane; i < n; i += kWarp) {
            const int d = l.dims[seg.slot + i];
            if (d >= 0) {
                const float x = (key[d] - l.center[seg.slot + i]) / l.scale[seg.slot + i];
                peak          = fmaxf(peak, fabsf(x));
                square += x * x;
                used += 1.0f;
            }
        }
        peak              = warp_max(peak);
        square            = warp_sum(square);
        const bool  fine  = seg.bits >= 4;
        uint32_t    code  = step_code(peak / middle, true);
        const float step  = fine ? step_value(code) : kGaussStep2 * sqrtf(square / warp_sum(used));
        const float inv   = step > 0.0f ? 1.0f / step : 0.0f;
        float       xl    = 0.0f;
        uint32_t *  words = block + (seg.offset + kStepsBytes) / 4;
        const int   group = cell / 16, per_byte = seg.bits == 1 ? 4 : 8 / seg.bits;
        for (int quad = lane; quad < seg.n_quad; quad += kWarp) {
            uint32_t packed = 0;
            for (int i = 0; i < 4; ++i) {
                const int slot = seg.slot + 4 * quad + i;
                const int d    = l.dims[slot];
                if (d < 0) {
                    continue;
                }
                const float    x = (key[d] - l.center[slot]) / l.scale[slot];
                const uint32_t u = static_cast<uint32_t>(fminf(top, fmaxf(0.0f, rintf(x * inv + middle))));
                xl += x * (static_cast<float>(u) - middle);
                packed |= u << (8 * i);
            }
            // With 1 bit two quads share their words, the second in the high nibbles (code_place of layout.h).
            const bool     pairs = seg.bits == 1;
            const int      shift = group % per_byte * seg.bits + (pairs ? quad % 2 * 4 : 0);
            const uint32_t field = 0x01010101u * ((1u << seg.bits) - 1u);
            const int      first = pairs ? quad / 2 * 16 : quad * (16 * seg.bits / 2);
            const int      word  = first + group / per_byte * 16 + cell % 16;
            put_bits(words + word, field << shift, packed << shift, zeroed);
        }
        xl   = warp_sum(xl);
        code = fine ? code : step_code(xl > 0.0f ? square / xl : 0.0f, false);
        if (lane == 0) {
            const int shift = cell % 4 * 8;
            put_bits(block + (seg.offset + cell) / 4, 0xffu << shift, code << shift, zeroed);
        }
    }
}

// ---- rebuild: all entries of a layer from the cache ---------------------------------------------------------------

// Grid: block of cells, KV head, stream. The block is put together in shared memory.
__global__ void __launch_bounds__(kWarps * kWarp)
    rebuild_kernel(const Node node, int64_t first_block, int64_t * n_different) {
    auto * const       block = dynamic_shared<uint32_t>();
    __shared__ float   keys[kWarps][FASA_MAX_HEAD_DIM];
    const int          warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const HeadLayout & l       = node.index.heads[blockIdx.y];
    const int          n_words = l.block_bytes / 4;
    for (int i = threadIdx.x; i < n_words; i += blockDim.x) {
        block[i] = 0;
    }
    __syncthreads();
    const int64_t   b     = first_block + blockIdx.x;
    const int64_t   first = b * FASA_BLOCK_CELLS;
    const uint8_t * rows  = node.k.data + blockIdx.z * node.k.stream + blockIdx.y * node.k.head;
    for (int c = warp; c < FASA_BLOCK_CELLS && first + c < node.n_kv; c += kWarps) {
        read_key(node.k, rows + (first + c) * node.k.cell, node.index.rotation, keys[warp], lane);
        write_cell(l, keys[warp], block, c, true, lane);
        __syncwarp();
    }
    __syncthreads();
    auto * out = reinterpret_cast<uint32_t *>(index_block(node.index, l, node.index.first_stream + blockIdx.z, b));
    for (int i = threadIdx.x; i < n_words; i += blockDim.x) {
        if (n_different == nullptr) {
            out[i] = block[i];
        } else if (out[i] != block[i]) {
            atomicAdd(reinterpret_cast<unsigned long long *>(n_different), 1ull);
        }
    }
}

// ---- prepare: the first phase of a node ----------------------------------------------------------

// A query's codes by one warp. It is on the way of everything behind it, so all that it reads is called for at once,
// and each lane keeps its slots in registers: OWN of them, and one more for padding between segments.
template <int OWN> __device__ void prepare_query(const Node & node, const Query & at, float * q, int lane) {
    const float *      source    = values_of(node, at);
    const HeadLayout & l         = node.index.heads[at.head_kv];
    const Segment      segment_0 = l.segments[0];
    const int          n_slot = l.n_slot, n_segment = l.n_segment;
    const Filter       filter = node.filters[at.number];
    int                dims[OWN + 1];
    float              x[OWN + 1];
#pragma unroll
    for (int i = 0; i <= OWN; ++i) {
        const int slot = min(i * kWarp + lane, kMaxSlots - 1);
        dims[i] = l.dims[slot], x[i] = l.scale[slot];
    }
    copy_without_rotation<OWN>(source, q, node.k.dim, node.index.rotation, lane);

    float square = 0.0f;
#pragma unroll
    for (int i = 0; i <= OWN; ++i) {
        x[i] = i * kWarp + lane < n_slot && dims[i] >= 0 ? q[dims[i]] * x[i] : 0.0f;
        square += x[i] * x[i];
    }
    int8_t * codes = node.scratch.codes + static_cast<int64_t>(at.number) * kMaxSlots;
    float *  level = node.scratch.levels + static_cast<int64_t>(at.number) * 2 * kSegments;
    for (int s = 0; s < n_segment; ++s) {
        const Segment seg  = s == 0 ? segment_0 : l.segments[s];
        float         peak = 0.0f;
        const auto    has = [&](int i) { return static_cast<unsigned>(i * kWarp + lane - seg.slot) < 4u * seg.n_quad; };
#pragma unroll
        for (int i = 0; i <= OWN; ++i) {
            peak = fmaxf(peak, has(i) ? fabsf(x[i]) : 0.0f);
        }
        peak            = warp_peak(peak);
        const float top = 127.0f; // no 16-bit sums here: all widths may use the whole range
        const float inv = peak > 0.0f ? top / peak : 0.0f;
        int         own = 0;
#pragma unroll
        for (int i = 0; i <= OWN; ++i) {
            const auto code = static_cast<int>(fminf(top, fmaxf(-top, rintf(x[i] * inv))));
            if (has(i)) {
                codes[i * kWarp + lane] = static_cast<int8_t>(code);
                own += code;
            }
        }
        const auto total = static_cast<float>(warp_total(own));
        if (lane == 0) { // bounded, so that no score is infinite or NaN: it would be neither above nor below others
            const float step = fminf(peak / top, kMaxLevel);
            level[2 * s]     = step;
            level[2 * s + 1] = step * total * 0.5f * static_cast<float>((1 << seg.bits) - 1);
        }
    }
    const float norm = sqrtf(warp_sum(square));
    if (lane == 0) {
        const bool known              = filter.mark < kNoFilter && norm > 1e-30f;
        node.scratch.norms[at.number] = norm;
        node.scratch.thresholds[at.number] =
            known ? Filter{filter.mark * norm, filter.level * norm} : Filter{CUDART_INF_F, CUDART_INF_F};
    }
}

// The first or last n cells that a row sees, in the order of cells: how many cells from that end they span. 256 cells
// at a time: the end of a context is mostly hidden.
__device__ int span_of(const uint16_t * mask, int n_kv, int n, bool from_end, int lane) {
    constexpr int kAtOnce = 8;
    for (int base = 0; base < n_kv && n > 0; base += kAtOnce * kWarp) {
        uint32_t seen[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int i = min(base + j * kWarp + lane, n_kv - 1); // no load has a condition
            seen[j]     = mask[from_end ? n_kv - 1 - i : i];
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            seen[j] = __ballot_sync(~0u, seen[j] != 0xfc00 && base + j * kWarp + lane < n_kv);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int here = __popc(seen[j]);
            if (n <= here) { // the n-th is one of these
                const bool is_last = (seen[j] >> lane & 1) != 0 && __popc(seen[j] & ((1u << lane) - 1)) == n - 1;
                return base + j * kWarp + __ffs(static_cast<int>(__ballot_sync(~0u, is_last)));
            }
            n -= here;
        }
    }
    return n > 0 ? n_kv : 0;
}

__device__ void prepare_row(const Node & node, const Query & at, bool from_end, int lane) {
    const int span =
        span_of(mask_of<uint16_t>(node, at), node.n_kv, from_end ? node.n_last : node.n_first, from_end, lane);
    const int row = at.stream * node.n_rows + at.row;
    if (lane == 0 && from_end) {
        node.scratch.windows[row].last_begin = node.n_kv - span;
    } else if (lane == 0) {
        node.scratch.n_visible[row]         = 0;
        node.scratch.windows[row].first_end = span;
    }
}

__device__ void encode_cell(const Node & node, int task, float * key, int lane) {
    const int     head   = task % node.n_head_kv;
    const int64_t cell   = node.new_cells[task / node.n_head_kv];
    const int64_t stream = cell / node.index.n_cell, of_stream = cell % node.index.n_cell;
    if (cell < 0 || stream >= node.index.n_stream) {
        return;
    }
    const HeadLayout & l  = node.index.heads[head];
    const int64_t      at = stream - node.index.first_stream; // negative for a stream before those of the node
    read_key(node.k, node.k.data + at * node.k.stream + head * node.k.head + of_stream * node.k.cell,
             node.index.rotation, key, lane);
    auto * block = reinterpret_cast<uint32_t *>(index_block(node.index, l, stream, of_stream / FASA_BLOCK_CELLS));
    write_cell(l, key, block, static_cast<int>(of_stream % FASA_BLOCK_CELLS), false, lane);
}

// The layout is needed last, and in pieces that depend on each other: all of it is called for at once.
__device__ void prefetch_layout(const HeadLayout & l, int lane) {
    for (int at = lane * 128; at < static_cast<int>(sizeof(HeadLayout)); at += kWarp * 128) {
        prefetch_l1(reinterpret_cast<const uint8_t *>(&l) + at);
    }
}

// A warp each: no other thread waits for it. Grid: KV head, and behind the last one the two ends of rows; stream, row
// and member of the group.
__global__ void __launch_bounds__(kWarp) prepare_kernel(const Node node) {
    __shared__ float q[FASA_MAX_HEAD_DIM];
    const int        lane = threadIdx.x, past = static_cast<int>(blockIdx.x) - node.n_head_kv;
    const Query      at = query_of(node, blockIdx.x, blockIdx.y);
    let_kernel_behind_begin();
    if (past >= 0) {
        if (at.member == 0) {
            prepare_row(node, at, past > 0, lane);
        }
    } else if (node.k.dim <= FASA_MAX_HEAD_DIM / 2) {
        prepare_query<FASA_MAX_HEAD_DIM / 2 / kWarp>(node, at, q, lane);
    } else {
        prepare_query<FASA_MAX_HEAD_DIM / kWarp>(node, at, q, lane);
    }
}

__global__ void __launch_bounds__(kWarps * kWarp) encode_kernel(const Node node) {
    __shared__ float keys[kWarps][FASA_MAX_HEAD_DIM];
    const int        warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int        task = blockIdx.x * kWarps + warp;
    if (task < node.n_new * node.n_head_kv) {
        prefetch_layout(node.index.heads[task % node.n_head_kv], lane);
        encode_cell(node, task, keys[warp], lane);
    }
}

} // namespace

cudaError_t launch_rebuild(const Node & node, int64_t first_block, int32_t max_block_bytes, int64_t * n_different,
                           const Queue & queue) {
    const dim3 grid(static_cast<unsigned>(n_blocks(node.n_kv) - first_block), node.n_head_kv, node.n_stream);
    return launch(queue, rebuild_kernel, grid, kWarps * kWarp, max_block_bytes, false, node, first_block, n_different);
}

cudaError_t launch_prepare(const Node & node, const Queue & queue) {
    const dim3 grid(node.n_head_kv + 2, node.group * node.n_rows * node.n_stream);
    return launch(queue, prepare_kernel, grid, kWarp, 0, false, node);
}

cudaError_t launch_encode(const Node & node, const Queue & queue) {
    const int n_task = node.n_new * node.n_head_kv;
    return n_task > 0 ? launch(queue, encode_kernel, (n_task + kWarps - 1) / kWarps, kWarps * kWarp, 0, false, node)
                      : cudaSuccess;
}

} // namespace fasa::gpu
