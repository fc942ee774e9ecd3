// The three stages as one table per instruction set. Signatures and shapes are those of fasa.cdef.h; arguments have
// been checked by the caller.
#pragma once

#include <cstdint>
#include <limits>

#include "fasa.h"
#include "kv_type.h"
#include "layout.h"

namespace fasa {

// The score of a cell that the query does not see.
constexpr float kHidden = -std::numeric_limits<float>::infinity();

struct Kernels {
    void (*score)(const Layout & layout, const float * q, int32_t n_q, const uint8_t * index, const uint64_t * visible,
                  int64_t n_block, int64_t b0, int64_t b1, float * scores, float * peaks);
    int64_t (*select)(const float * scores, const float * peaks, int64_t n_block, int64_t budget, float * scratch,
                      int32_t * cells);
    void (*attend)(const fasa_kv & kv, const float * q, const int32_t * cells, int64_t n, float * m, float * d,
                   float * o);
};

extern const Kernels kReference;
extern const Kernels kPortable;
extern const Kernels kAvx2;   // defined on x86-64 only
extern const Kernels kAvx512; // likewise

// AUTO is resolved; fails with a sentence when this CPU cannot run it.
const Kernels & kernels_of(int32_t isa);

} // namespace fasa
