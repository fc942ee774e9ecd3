// What the side index keeps of one KV head, and how a key becomes an entry of it.
//
// A block holds 64 cells. In it, each segment (the chunks of equal bits) has 64 steps of a byte, then its quads. A quad
// is two chunks, four dims; its four codes of one cell lie in one 32-bit lane, so that a byte dot product gives one
// cell's sum per lane. 16 cells make a group of 64 bytes. With 8 bits a quad is four groups; with 4 bits two, the
// high nibbles being the 16 cells after; with 2 bits one, each 2-bit field being 16 cells; with 1 bit two quads share
// one, the second in the high nibbles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fasa.h"

namespace fasa {

struct Segment {
    int32_t bits;
    int32_t n_quad;
    int32_t slot;   // first of its 4 * n_quad slots
    int64_t offset; // bytes from the start of a block to its steps; quads follow
};

struct Layout {
    static constexpr int32_t kNoDim = -1;

    int32_t              head_dim = 0;
    std::vector<Segment> segments;
    std::vector<int32_t> dims;   // per slot: the dim it keeps, kNoDim for padding
    std::vector<float>   center; // per slot
    std::vector<float>   scale;  // per slot
    int64_t              block_bytes = 0;

    Layout(int32_t head_dim, int32_t n_rot, int32_t rope, int32_t n_fc, const uint16_t * fc, const uint8_t * bits,
           const float * center, const float * scale);

    int32_t n_slot() const { return static_cast<int32_t>(dims.size()); }

    // Writes one cell of a block from a key in the RoPE basis, f32 [head_dim].
    void write(const float * key, uint8_t * block, int32_t cell) const;
};

constexpr int32_t kWidths[]   = {8, 4, 2, 1}; // bits, in the order of their segments
constexpr int32_t kMaxSegment = 4;
constexpr int32_t kMaxSlots   = FASA_MAX_HEAD_DIM + 3 * 2 + 6; // padding: half a quad, with 1 bit one and a half
constexpr int64_t kStepsBytes = FASA_BLOCK_CELLS;

constexpr int64_t kMaxBlockBytes = kMaxSegment * kStepsBytes + FASA_BLOCK_CELLS * kMaxSlots; // all at 8 bits

inline int64_t quad_bytes(int32_t bits) { return FASA_BLOCK_CELLS * 4 * bits / 8; } // with 1 bit: half of a pair

// Step of a uniform quantizer with 4 levels for Gaussian values, in units of their standard deviation; it minimizes
// the mean square error (Max 1960). With 2 levels it does not matter.
constexpr float kGaussStep2 = 0.9957f;

inline bool width_exists(int32_t bits) { return bits == 1 || bits == 2 || bits == 4 || bits == 8; }

// A step is a float of 4 exponent and 4 mantissa bits, 2^-8 to 248: a rounding of at most 3 %, less than that of the
// codes. Its bits, moved into place, are those of the f32 less the exponent's offset.
constexpr uint32_t kStepOffset = 119u << 23;
constexpr float    kStepMin    = 0.00390625f;
constexpr float    kStepMax    = 248.0f;

inline uint8_t step_code(float step, bool up = false) { // the nearest, or the least that is not below
    const float kept = step > kStepMin ? (step < kStepMax ? step : kStepMax) : kStepMin; // NaN: the least
    uint32_t    bits;
    std::memcpy(&bits, &kept, sizeof(bits));
    const uint32_t half = up ? (1u << 19) - 1 : 1u << 18;
    return static_cast<uint8_t>(std::min<uint32_t>((bits - kStepOffset + half) >> 19, 255));
}

inline float step_value(uint8_t code) {
    const uint32_t bits = (static_cast<uint32_t>(code) << 19) + kStepOffset;
    float          step;
    std::memcpy(&step, &bits, sizeof(step));
    return step;
}

// Largest code of a query dim: with 8-bit index codes a pair of products must stay inside int16 on AVX2.
inline int32_t query_levels(int32_t bits) { return bits == 8 ? 64 : 127; }

// Byte of a segment's quads in which the code of (slot i of the segment, cell) lies, and its shift.
struct CodePlace {
    int64_t byte;
    int32_t shift;
};

inline CodePlace code_place(int32_t bits, int32_t i, int32_t cell) {
    const int32_t per_byte = std::min(8 / bits, 4);
    const int32_t group    = cell / 16;
    const int32_t quad     = i / 4;
    const int64_t first    = bits == 1 ? quad / 2 * int64_t{64} : quad * quad_bytes(bits);
    const int32_t high     = bits == 1 ? quad % 2 * 4 : 0;
    return {first + (group / per_byte) * int64_t{64} + (cell % 16) * 4 + i % 4, (group % per_byte) * bits + high};
}

// A query of one head made ready for one layout: codes per slot, and per segment the two numbers of
//   score = step * (query_step * sum(q_code * u) - bias).
struct ScoreQuery {
    int8_t codes[kMaxSlots];
    float  step[kMaxSegment];
    float  bias[kMaxSegment];

    void prepare(const Layout & layout, const float * q); // q in the RoPE basis
};

} // namespace fasa
