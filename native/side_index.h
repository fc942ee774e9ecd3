// The side index of one layer: packed chunks of every cached key, and which cells it must read again.
//
// It is derived from the K cache and never trusted further than its dirty bits: whatever writes to K sets them (see
// session.cpp), and the attention node rebuilds dirty cells before it scores. A new index is dirty all over.
#pragma once

#include <ggml.h>

#include <memory>
#include <vector>

#include "memory.h"
#include "plan.h"

namespace fasa {

class SideIndex {
  public:
    // Of a node that plan() accepted. keep_keys: a copy of the keys as floats beside it, for scores from outside.
    SideIndex(const Plan & plan, std::shared_ptr<const Profile::Layouts> layouts, bool keep_keys);

    // False when the cache tensor behind a node or the layouts are not those this index was built for.
    bool serves(const Plan & plan, const Profile::Layouts * layouts, bool keep_keys) const;

    void mark_all();
    void mark_cell(int64_t cell);                      // as SET_ROWS numbers them, through all streams
    bool mark_bytes(const void * first, size_t size);  // an overwritten range of memory; true if it touches K
    void clear_marks(int64_t stream, int64_t n_block); // its first n_block blocks are up to date

    // Part of the index: blocks b0 <= b < b1 of a stream for KV heads h0 <= h < h1. Threads work on disjoint parts.
    struct Part {
        int64_t stream, b0, b1;
        int32_t h0, h1;
    };

    // Rebuilds the dirty cells of a part; returns how many it had.
    int64_t refresh(const Part & part);

    // Rebuilds every cell of a part; returns how many entries were not what K says.
    int64_t verify(const Part & part);

    const Layout &  layout(int32_t head) const { return (*layouts_)[layer_][head]; }
    const uint8_t * blocks(int64_t stream, int32_t head) const {
        return data_[head].get() + stream * blocks_per_stream_ * layout(head).block_bytes;
    }
    // f32 [head_dim, n_cell] of a stream and KV head in the RoPE basis, where they are kept.
    const float * keys(int64_t stream, int32_t head) const {
        return keys_.get() + (head * n_stream_ + stream) * n_cell_ * head_dim_;
    }
    int64_t n_cell() const { return n_cell_; }
    int64_t first_dirty(int64_t stream, int64_t n_block) const; // a cell; n_cell() when none is

    int64_t bytes() const;
    int64_t block_bytes() const; // of all KV heads

    bool is_of(const ggml_tensor & root) const { return root_ == CacheTensor(root); }

  private:
    int64_t   cells_in(int64_t block) const; // 64, or less in the last block of a stream
    uint8_t * block_of(int64_t stream, int64_t block, int32_t head);
    // A key as floats in the RoPE basis, f32 [head_dim].
    void read_key(int64_t stream, int64_t cell, int32_t head, float * out) const;

    CacheTensor                             root_;
    int32_t                                 layer_, n_head_kv_, head_dim_, rotation_;
    int64_t                                 n_stream_, n_cell_, blocks_per_stream_; // n_cell_: of one stream
    int64_t                                 head_bytes_;
    std::shared_ptr<const Profile::Layouts> layouts_;
    std::vector<Aligned<uint8_t>>           data_;  // per KV head, stream by stream
    Aligned<float>                          keys_;  // see keys()
    std::vector<uint64_t>                   dirty_; // a word per block, bit c: its cell c
};

} // namespace fasa
