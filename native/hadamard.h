// The normalized Walsh-Hadamard transform that llama.cpp applies to q and k of a quantized K cache after RoPE.
#pragma once

#include <cmath>
#include <cstdint>

namespace fasa {

// In place on one block; size is a power of two. Its own inverse.
static inline void hadamard(float * x, int32_t size) {
    for (int32_t half = 1; half < size; half *= 2) {
        for (int32_t i = 0; i < size; i += 2 * half) {
            for (int32_t j = i; j < i + half; ++j) {
                const float a = x[j];
                const float b = x[j + half];
                x[j]          = a + b;
                x[j + half]   = a - b;
            }
        }
    }
    const float norm = 1.0f / std::sqrt(static_cast<float>(size));
    for (int32_t i = 0; i < size; ++i) {
        x[i] *= norm;
    }
}

// A head of `dim` values that was rotated block by block; block 0 means not rotated.
static inline void undo_rotation(float * head, int32_t dim, int32_t block) {
    for (int32_t i = 0; block > 0 && i + block <= dim; i += block) {
        hadamard(head + i, block);
    }
}

} // namespace fasa
