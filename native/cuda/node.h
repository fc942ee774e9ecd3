// What the kernels are told: plain structs in which every pointer is device memory. Strides are bytes.
#pragma once

#include <cstdint>

#include "fasa.h"

#ifdef __CUDACC__
#define FASA_BOTH __host__ __device__
#else
#define FASA_BOTH
#endif

namespace fasa::gpu {

constexpr int32_t kMaxSlots  = 272; // of a layout: FASA_MAX_HEAD_DIM and padding, a multiple of 8
constexpr int32_t kSegments  = 4;   // 8, 4, 2 and 1 bits
constexpr int32_t kMaxSplits = 64;  // of a query's selection
constexpr int32_t kPeak      = 8;   // consecutive cells that share a peak (the CPU's peaks are strided)
constexpr int32_t kAhead     = 3;   // matrices that llama.cpp multiplies by behind attention
constexpr float   kNoFilter  = 3.402823466e38f;
constexpr float   kForced    = 3.402823466e38f; // the score of cells that are always selected: no other reaches it

struct Segment {
    int32_t bits, n_quad, slot, offset;
};

// One KV head's Layout (layout.h) as arrays of fixed size.
struct HeadLayout {
    int64_t first; // bytes from the start of the layer's index to this head's blocks
    int32_t block_bytes, n_slot, n_segment;
    Segment segments[kSegments];
    int16_t dims[kMaxSlots]; // -1: padding
    float   center[kMaxSlots];
    float   scale[kMaxSlots];
};

// K or V of the cache as the node views it.
struct Rows {
    const uint8_t * data;
    int64_t         cell, head, stream; // stream: that of the cache, also where the node views only one
    int32_t         type;               // fasa_kv_type
    int32_t         dim;
};

// What a layer's selections of a query leave for the next token's, in units of the query's norm: a score that 2.5 times
// the budget of cells should reach, and the one that the budget of them reached. kNoFilter: nothing is known.
struct Filter {
    float mark, level;
};

struct Index {
    uint8_t *          data;
    const HeadLayout * heads;             // [n_head_kv]
    int64_t            blocks_per_stream; // a head's streams follow each other
    int64_t            first_stream;      // of the cache, where the node's stream 0 lies
    int64_t            n_cell, n_stream;  // of the cache: cells of one stream, and streams
    int32_t            rotation;          // Hadamard block of q and k; 0: none
    int32_t            bits;              // of the only segment of every head; 0: there are several
};

// Cells before first_end and from last_begin on are selected whatever they score.
struct Window {
    int32_t first_end, last_begin;
};

// Memory that is read soon.
struct Piece {
    const uint8_t * data;
    int64_t         bytes;
};

// Work space of one node at a time; a query is (stream, row, head), the head innermost.
struct Scratch {
    int8_t *   codes;      // [kMaxSlots, n_query]
    float *    levels;     // [2, kSegments, n_query]: step, bias
    float *    norms;      // [n_query]: of the query's kept dims, the unit of filters
    Filter *   thresholds; // [n_query]: the filter times the norm; +inf: none
    float *    scores;     // [64 * n_block, n_query]
    float *    peaks;      // [8 * n_block, n_query]
    int32_t *  n_visible;  // [n_rows * n_stream]
    Window *   windows;    // likewise
    int32_t *  cells;      // [max_selected, n_query]
    int32_t *  n_selected; // [n_query]
    float *    parts;      // [2 + v_dim, n_split, n_query]
    int32_t *  arrived;    // [n_query], zero between nodes
    uint32_t * marks;      // [2 * n_block, n_query]: a bit for every cell that reached its query's threshold
    int64_t *  totals;     // [4], until read: cells visible and attended; differences that rebuild found; queries
                           // whose filter was right
};

struct Node {
    const float *   q;
    int64_t         q_row, q_head, q_stream;
    Rows            k, v;
    const uint8_t * mask; // f16
    int64_t         mask_row, mask_stream;
    const float *   sinks; // logits per head, or nullptr
    float *         out;
    int64_t         out_head, out_row, out_stream;
    int32_t         n_kv, n_rows, n_stream, n_head, n_head_kv, group; // group: query heads of a KV head
    float           scale, softcap;

    Index           index;
    const int64_t * new_cells; // as SET_ROWS numbers them, through all streams
    int32_t         n_new;

    int32_t  budget, min_ctx, n_first, n_last; // first and last visible cells, in cell order
    int32_t  max_selected, n_split;
    Filter * filters; // [n_query] of the layer
    Scratch  scratch;
    Piece    ahead[kAhead]; // what llama.cpp reads next: select calls it into the L2 cache; bytes 0: nothing
};

FASA_BOTH inline int64_t n_blocks(int64_t n_kv) { return (n_kv + FASA_BLOCK_CELLS - 1) / FASA_BLOCK_CELLS; }

// Thread blocks that share a query's selection: 128 cells each, fewer when that would leave most of a device idle.
inline int32_t n_splits(int32_t budget, int64_t n_query) {
    int32_t n = (budget + 127) / 128;
    while (n * n_query < 256 && 2 * n <= (budget + 31) / 32) {
        n *= 2;
    }
    return n < kMaxSplits ? n : kMaxSplits;
}

} // namespace fasa::gpu
