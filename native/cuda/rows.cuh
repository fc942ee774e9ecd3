// K and V rows in the cache's formats, 16 dims at a time: the share of one lane, in units of what load() returns.
// Blocks of quantized types are only 2-byte aligned, so their codes are read as aligned words and shifted.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "node.h"

namespace fasa::gpu {

constexpr int kLaneDims = 16;

__device__ inline float half_at(const uint8_t * p) { return __half2float(*reinterpret_cast<const __half *>(p)); }

// 16 bytes from an address that is a multiple of 2: four aligned words and the two bytes after them. An aligned start
// needs no more than the words, but a branch would keep the loads of several rows from being under way at once.
__device__ inline void load_codes(const uint8_t * p, uint32_t out[4]) {
    const auto       at    = reinterpret_cast<uintptr_t>(p);
    const uint32_t   shift = (at & 2) * 8;
    const uint32_t * words = reinterpret_cast<const uint32_t *>(at & ~uintptr_t{3});
    const uint32_t   w0 = words[0], w1 = words[1], w2 = words[2], w3 = words[3];
    const uint32_t   w4 = *reinterpret_cast<const uint16_t *>(p + 14); // inside the row: the last two of the 16 bytes
    out[0]              = __funnelshift_r(w0, w1, shift);
    out[1]              = __funnelshift_r(w1, w2, shift);
    out[2]              = __funnelshift_r(w2, w3, shift);
    out[3]              = w3 >> shift | (shift != 0 ? w4 << 16 : 0u);
}

// Byte i of a word as a float, less `bias`: the byte in the mantissa of 2^23, which is several times as fast as a
// conversion.
__device__ inline float byte_at(uint32_t word, int i, float bias) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650u + static_cast<uint32_t>(i))) - (8388608.0f + bias);
}

struct RowF16 {
    static constexpr int    kAtOnce = 4; // rows whose loads are under way together
    static __device__ float load(const uint8_t * row, int lane, float out[kLaneDims]) {
        const uint4 * p = reinterpret_cast<const uint4 *>(row + lane * 32);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4     raw = p[i];
            const __half2 * h   = reinterpret_cast<const __half2 *>(&raw);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 x     = __half22float2(h[j]);
                out[8 * i + 2 * j] = x.x, out[8 * i + 2 * j + 1] = x.y;
            }
        }
        return 1.0f;
    }
};

struct RowBf16 {
    static constexpr int    kAtOnce = 4; // rows whose loads are under way together
    static __device__ float load(const uint8_t * row, int lane, float out[kLaneDims]) {
        const uint4 * p = reinterpret_cast<const uint4 *>(row + lane * 32);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4      raw = p[i];
            const uint32_t * w   = reinterpret_cast<const uint32_t *>(&raw);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                out[8 * i + 2 * j]     = __uint_as_float(w[j] << 16);
                out[8 * i + 2 * j + 1] = __uint_as_float(w[j] & 0xffff0000u);
            }
        }
        return 1.0f;
    }
};

struct RowQ80 {
    static constexpr int    kAtOnce = 8; // rows whose loads are under way together
    static __device__ float load(const uint8_t * row, int lane, float out[kLaneDims]) {
        const uint8_t * block = row + lane / 2 * 34;
        uint32_t        codes[4];
        load_codes(block + 2 + lane % 2 * 16, codes);
        const float step = half_at(block);
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) { // signed bytes; with the top bit turned over, 0 to 255
            out[i] = byte_at(codes[i / 4] ^ 0x80808080u, i % 4, 128.0f);
        }
        return step;
    }
};

struct RowQ40 {
    static constexpr int    kAtOnce = 8; // rows whose loads are under way together
    static __device__ float load(const uint8_t * row, int lane, float out[kLaneDims]) {
        const uint8_t * block = row + lane / 2 * 18;
        uint32_t        codes[4];
        load_codes(block + 2, codes);
        const float step  = half_at(block);
        const int   shift = lane % 2 * 4; // the second half of a block is in the high nibbles
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
            out[i] = byte_at(codes[i / 4] >> shift & 0x0f0f0f0fu, i % 4, 8.0f);
        }
        return step;
    }
};

__device__ inline int row_bytes(const Rows & rows) {
    const int blocks = rows.dim / 32;
    return blocks * (rows.type == FASA_KV_Q8_0 ? 34 : rows.type == FASA_KV_Q4_0 ? 18 : 64);
}

template <typename R> __device__ void load_scaled(const uint8_t * row, int lane, float out[kLaneDims]) {
    const float unit = R::load(row, lane, out);
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
        out[i] *= unit;
    }
}

__device__ inline void load_lane(int32_t type, const uint8_t * row, int lane, float out[kLaneDims]) {
    switch (type) {
        case FASA_KV_F16: load_scaled<RowF16>(row, lane, out); break;
        case FASA_KV_BF16: load_scaled<RowBf16>(row, lane, out); break;
        case FASA_KV_Q8_0: load_scaled<RowQ80>(row, lane, out); break;
        default: load_scaled<RowQ40>(row, lane, out); break;
    }
}

// The block of 64 cells that a head's index keeps for a stream of the node.
__device__ inline uint8_t * index_block(const Index & index, const HeadLayout & head, int64_t cache_stream,
                                        int64_t block) {
    return index.data + head.first + (cache_stream * index.blocks_per_stream + block) * head.block_bytes;
}

} // namespace fasa::gpu
