// Products of a block of 64 cells with four queries, by one warp on matrix units: integers, so they are exact.
//
// A product has 16 rows, which are cells, and 8 columns. The four queries take its left columns, with zeros to their
// right, for one half of the cells, and its right columns for the other half, added to the same sums: so every lane
// ends up with the sums of two queries and four cells, and no column is idle.
//
// Loading, lane 4 g + t has, for dims of quads t and 4 + t, the codes of eight cells: four from 32 (g / 4) + 4 (g % 4)
// on, and four 16 further. One load of 16 bytes has them for a quad, in all widths of the index.
#pragma once

#include "ptx.cuh"
#include "rows.cuh"

namespace fasa::gpu {

constexpr int kColumns = 4; // queries

// A lane's share of the sums: queries first_query and the next; cells first_cell, the next, and both 16 further.
struct Lane {
    int t, g, pair, first_query, first_cell;

    __device__ explicit Lane(int lane)
        : t(lane % 4), g(lane / 4), pair(lane / 16), first_query(lane % 2 * 2),
          first_cell(lane / 16 * 32 + lane / 4 % 4 * 4 + lane % 4 / 2 * 2) {}
};

// What a lane knows of the query whose codes it loads, number g % 4; at least one mask is zero.
struct QueryCodes {
    const int32_t * quads;
    int32_t         left, right; // masks

    __device__ QueryCodes(const int8_t * codes, bool exists, const Lane & at)
        : quads(reinterpret_cast<const int32_t *>(codes) + at.t), left(exists && at.g < kColumns ? -1 : 0),
          right(exists && at.g >= kColumns ? -1 : 0) {}
};

// Bytes from the start of the quads to a lane's 16 bytes of its first quad, t; four quads later they are 128 BITS on.
template <int BITS> __device__ int lane_offset(const Lane & at) {
    const int column = at.g % 4 * 16;
    return BITS == 8   ? at.t * 256 + at.pair * 128 + column
           : BITS == 4 ? at.t * 128 + at.pair * 64 + column
           : BITS == 2 ? at.t * 64 + column
                       : at.t / 2 * 64 + column;
}

// Codes are used where they lie in their bytes: those of the lane's first two cells are 2^shift times as large, those
// of the other two 2^BITS times as large as that.
template <int BITS> __device__ int code_shift(const Lane & at) {
    return BITS == 2 ? at.pair * 4 : BITS == 1 ? at.pair * 2 : 0;
}

// A lane's codes of a quad as they lie in the index, which is read once per token and layer: it must not push the
// scores out of the L2 cache.
template <int BITS> struct Chunk {
    uint4 raw[BITS == 8 ? 2 : 1];

    __device__ void load(const uint8_t * p) {
        raw[0] = __ldcs(reinterpret_cast<const uint4 *>(p));
        if constexpr (BITS == 8) { // the group of 16 cells after
            raw[1] = __ldcs(reinterpret_cast<const uint4 *>(p + 64));
        }
    }

    // One dim per byte: of the lane's cell i, and of its cell 16 + i.
    __device__ uint2 codes(int i, const Lane & at) const {
        const auto word = [i](const uint4 & r) { return i == 0 ? r.x : i == 1 ? r.y : i == 2 ? r.z : r.w; };
        if constexpr (BITS == 8) {
            return {word(raw[0]), word(raw[1])};
        } else {
            constexpr uint32_t kField = BITS == 4 ? 0x0f0f0f0fu : BITS == 2 ? 0x03030303u : 0x01010101u;
            const uint32_t     field  = kField << code_shift<BITS>(at);
            const uint32_t     w      = BITS == 1 ? word(raw[0]) >> (at.t % 2 * 4) : word(raw[0]); // of two quads
            return {w & field, w & field << BITS};
        }
    }
};

// Products of 4 LOADS quads: the lane's codes of the index and of its query, of every fourth quad.
template <int BITS, int LOADS>
__device__ void multiply_chunks(const Chunk<BITS> chunks[LOADS], const int32_t codes[LOADS], const QueryCodes & q,
                                const Lane & at, int32_t sums[2][4]) {
#pragma unroll
    for (int j = 0; j < LOADS; j += 2) {
        const int32_t left[2]  = {codes[j] & q.left, codes[j + 1] & q.left};
        const int32_t right[2] = {codes[j] & q.right, codes[j + 1] & q.right};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint2    a = chunks[j].codes(i, at), b = chunks[j + 1].codes(i, at);
            const uint32_t cells[4] = {a.x, a.y, b.x, b.y};
            multiply_add(sums[i % 2], cells, i < 2 ? left : right);
        }
    }
}

// Products of 16 quads, or if not FULL of up to 8, n of which are there: the others count nothing. `quads` and `query`
// are the lane's.
template <int BITS, bool FULL>
__device__ void add_quads(const uint8_t * quads, int n, const int32_t * query, const QueryCodes & q, const Lane & at,
                          int32_t sums[2][4]) {
    constexpr int kLoads = FULL ? 4 : 2;
    Chunk<BITS>   chunks[kLoads];
    int32_t       codes[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) { // all on their way at once
        const bool there = FULL || 4 * j + at.t < n;
        chunks[j].load(there ? quads + j * 128 * BITS : quads - lane_offset<BITS>(at));
        codes[j] = there ? query[4 * j] : 0;
    }
    multiply_chunks<BITS, kLoads>(chunks, codes, q, at, sums);
}

// sums[s]: the lane's cells first_cell + s, with both queries, and first_cell + 16 + s, likewise; slot: the segment's.
template <int BITS>
__device__ void add_products(const uint8_t * quads, int n_quad, int slot, const QueryCodes & q, const Lane & at,
                             int32_t sums[2][4]) {
    const uint8_t * own   = quads + lane_offset<BITS>(at);
    const int32_t * query = q.quads + slot / 4;
    int             n     = n_quad;
    for (; BITS < 8 && n >= 16; n -= 16, own += 512 * BITS, query += 16) {
        add_quads<BITS, true>(own, n, query, q, at, sums);
    }
    for (; n > 0; n -= 8, own += 256 * BITS, query += 8) {
        add_quads<BITS, false>(own, n, query, q, at, sums);
    }
}

} // namespace fasa::gpu
