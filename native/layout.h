// What the side index keeps of one KV head, and how a key becomes an entry of it.
//
// A block holds 64 cells. In it, each segment (the chunks of equal bits) has 64 f16 steps, then its quads. A quad is
// two chunks, four dims; its four codes of one cell lie in one 32-bit lane, so that a byte dot product gives one
// cell's sum per lane. 16 cells make a group of 64 bytes. With 8 bits a quad is four groups; with 4 bits two, the
// high nibbles being the 16 cells after; with 2 bits one, each 2-bit field being 16 cells.
#pragma once

#include <cstdint>
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

constexpr int32_t kMaxSlots   = FASA_MAX_HEAD_DIM + 3 * 2; // each segment may end in half a quad of padding
constexpr int64_t kStepsBytes = FASA_BLOCK_CELLS * 2;      // f16

constexpr int64_t kMaxBlockBytes = 3 * kStepsBytes + FASA_BLOCK_CELLS * kMaxSlots; // all at 8 bits

inline int64_t quad_bytes(int32_t bits) { return FASA_BLOCK_CELLS * 4 * bits / 8; }

// Largest code of a query dim: with 8-bit index codes a pair of products must stay inside int16 on AVX2.
inline int32_t query_levels(int32_t bits) { return bits == 8 ? 64 : 127; }

// Byte of a quad in which the code of (cell, lane) lies, and its shift.
struct CodePlace {
    int64_t byte;
    int32_t shift;
};

inline CodePlace code_place(int32_t bits, int32_t cell, int32_t lane) {
    const int32_t per_byte = 8 / bits;
    const int32_t group    = cell / 16;
    return {(group / per_byte) * int64_t{64} + (cell % 16) * 4 + lane, (group % per_byte) * bits};
}

// A query of one head made ready for one layout: codes per slot, and per segment the two numbers of
//   score = step * (query_step * sum(q_code * u) - bias).
struct ScoreQuery {
    int8_t codes[kMaxSlots];
    float  step[3];
    float  bias[3];

    void prepare(const Layout & layout, const float * q); // q in the RoPE basis
};

} // namespace fasa
