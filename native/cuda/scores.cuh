// What a warp makes of the products of a block with four queries (products.cuh): scores, and what select looks at
// first.
#pragma once

#include "products.cuh"

namespace fasa::gpu {

struct Scores { // of a lane: [query, half, cell], the second half being its cells 16 further
    float x[2][2][2];
};

// scores += step * (level * sum - bias); steps: of the lane's first two cells, and of those 16 further.
template <int BITS>
__device__ void add_scaled(const int32_t sums[2][4], const uint32_t steps[2], const float2 levels[2], const Lane & at,
                           Scores & scores) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int   shift = code_shift<BITS>(at) + (BITS < 8 && half == 1 ? BITS : 0);
        const float unit  = __int_as_float((127 - shift) << 23);
#pragma unroll
        for (int s = 0; s < 2; ++s) { // the step of a cell is a byte (step_value of layout.h)
            const float step = __uint_as_float(((steps[half] >> (8 * s) & 0xffu) << 19) + kStepOffset);
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                const auto sum = static_cast<float>(sums[s][2 * half + q]);
                scores.x[q][half][s] += step * (levels[q].x * unit * sum - levels[q].y);
            }
        }
    }
}

__device__ inline uint32_t steps_at(const uint8_t * p) { return __ldcs(reinterpret_cast<const uint16_t *>(p)); }

// The largest of eight cells that follow each other, from the four lanes that share them. Each lane has one of 32 in
// the end: of its query g % 2, and eight cells of the block.
__device__ inline float peak_of(const Scores & scores, const Lane & at) {
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
__device__ inline uint32_t marks_of(const Scores & scores, const float thresholds[2], int lane) {
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

} // namespace fasa::gpu
