// The types that llama.cpp stores K and V in: their sizes, and their plain reading. The SIMD readings are in
// cpu/rows.inl, one traits struct per type.
#pragma once

#include <cstdint>

#include "fasa.h"

namespace fasa {

constexpr int32_t kKvBlock = 32; // values; types without blocks are counted in blocks as well

struct KvType {
    int32_t id; // fasa_kv_type
    int32_t block_bytes;
    void (*block_to_float)(const uint8_t * block, float * out); // f32 [32]
};

// nullptr for a type without a kernel.
const KvType * kv_type(int32_t id);

// Bytes of a row of n values, a multiple of 32; 0 for a type without a kernel.
int64_t kv_row_bytes(int32_t type, int64_t n);

// A row of a known type as floats, f32 [n].
void kv_to_float(int32_t type, const void * row, int32_t n, float * out);

// What a 4-bit code of iq4_nl stands for, times the block's step (ggml's kvalues_iq4nl).
constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

} // namespace fasa
