// Dot products of queries with a block of the index, eight cells per thread: what score does for all blocks, and
// prepare for a sample of them.
#pragma once

#include <cstdint>

#include "kernels.cuh"
#include "rows.cuh"

namespace fasa::gpu {

constexpr int kBlockThreads = 8; // per block of 64 cells
constexpr int kCells        = 8; // of a thread: 4 from cell `low`, 4 from cell `low` + 16

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

// Cells that the row sees, bit i for cell i of the thread's eight.
__device__ inline uint32_t visible_bits(const uint8_t * mask, int64_t first, int n_kv) {
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

} // namespace fasa::gpu
