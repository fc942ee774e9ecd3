#include "side_index.h"

#include <algorithm>
#include <cstring>

#include "hadamard.h"
#include "kernels.h"

namespace fasa {

SideIndex::SideIndex(const Plan & plan, std::shared_ptr<const Profile::Layouts> layouts, bool keep_keys)
    : root_(*plan.k_root), layer_(plan.layer), n_head_kv_(plan.n_head_kv),
      head_dim_(static_cast<int32_t>(plan.k->ne[0])), rotation_(plan.rotation), n_stream_(root_.n_stream),
      n_cell_(root_.n_cell), blocks_per_stream_((n_cell_ + FASA_BLOCK_CELLS - 1) / FASA_BLOCK_CELLS),
      head_bytes_(static_cast<int64_t>(plan.k->nb[2])), layouts_(std::move(layouts)) {
    const int64_t n_block = n_stream_ * blocks_per_stream_;
    for (int32_t h = 0; h < n_head_kv_; ++h) {
        data_.push_back(make_aligned<uint8_t>(n_block * layout(h).block_bytes));
    }
    if (keep_keys) {
        keys_ = make_aligned<float>(n_stream_ * n_cell_ * n_head_kv_ * head_dim_);
    }
    dirty_.assign(n_block, ~uint64_t{0});
}

bool SideIndex::serves(const Plan & plan, const Profile::Layouts * layouts, bool keep_keys) const {
    return keep_keys == (keys_ != nullptr) && is_of(*plan.k_root) && layouts_.get() == layouts &&
           n_head_kv_ == plan.n_head_kv && head_dim_ == static_cast<int32_t>(plan.k->ne[0]) &&
           rotation_ == plan.rotation && head_bytes_ == static_cast<int64_t>(plan.k->nb[2]);
}

int64_t SideIndex::cells_in(int64_t block) const {
    return std::min<int64_t>(FASA_BLOCK_CELLS, n_cell_ - block * FASA_BLOCK_CELLS);
}

uint8_t * SideIndex::block_of(int64_t stream, int64_t block, int32_t head) {
    return data_[head].get() + (stream * blocks_per_stream_ + block) * layout(head).block_bytes;
}

// ---- what is out of date -----------------------------------------------------------------------------------

void SideIndex::mark_all() { std::fill(dirty_.begin(), dirty_.end(), ~uint64_t{0}); }

void SideIndex::mark_cell(int64_t cell) {
    if (cell >= 0 && cell < n_stream_ * n_cell_) {
        const int64_t of_stream = cell % n_cell_;
        dirty_[cell / n_cell_ * blocks_per_stream_ + of_stream / FASA_BLOCK_CELLS] |= uint64_t{1}
                                                                                      << (of_stream % FASA_BLOCK_CELLS);
    }
}

bool SideIndex::mark_bytes(const void * first, size_t size) {
    bool touched = false;
    for_cells_in(root_.data, root_.row_bytes, n_stream_ * n_cell_, first, size, [&](int64_t cell) {
        mark_cell(cell);
        touched = true;
    });
    return touched;
}

int64_t SideIndex::first_dirty(int64_t stream, int64_t n_block) const {
    const uint64_t * words = dirty_.data() + stream * blocks_per_stream_;
    for (int64_t b = 0; b < n_block; ++b) {
        if (words[b] != 0) {
            return b * FASA_BLOCK_CELLS + __builtin_ctzll(words[b]);
        }
    }
    return n_cell_;
}

void SideIndex::clear_marks(int64_t stream, int64_t n_block) {
    std::fill_n(dirty_.begin() + stream * blocks_per_stream_, n_block, uint64_t{0});
}

// ---- rebuilding ------------------------------------------------------------------------------------------------

void SideIndex::read_key(int64_t stream, int64_t cell, int32_t head, float * out) const {
    const char * row = static_cast<const char *>(root_.data) + (stream * n_cell_ + cell) * root_.row_bytes;
    kv_to_float(root_.type, row + head * head_bytes_, head_dim_, out);
    undo_rotation(out, head_dim_, rotation_);
}

int64_t SideIndex::refresh(const Part & part) {
    int64_t n = 0;
    float   key[FASA_MAX_HEAD_DIM];
    for (int64_t b = part.b0; b < part.b1; ++b) {
        for (uint64_t bits = dirty_[part.stream * blocks_per_stream_ + b]; bits != 0; bits &= bits - 1) {
            const int32_t c = __builtin_ctzll(bits);
            if (c >= cells_in(b)) {
                break;
            }
            for (int32_t h = part.h0; h < part.h1; ++h) {
                read_key(part.stream, b * FASA_BLOCK_CELLS + c, h, key);
                layout(h).write(key, block_of(part.stream, b, h), c);
                if (keys_ != nullptr) {
                    const int64_t at = (h * n_stream_ + part.stream) * n_cell_ + b * FASA_BLOCK_CELLS + c;
                    std::copy_n(key, head_dim_, keys_.get() + at * head_dim_);
                }
            }
            ++n;
        }
    }
    return n;
}

int64_t SideIndex::verify(const Part & part) {
    int64_t failures = 0;
    float   key[FASA_MAX_HEAD_DIM];
    uint8_t before[kMaxBlockBytes];
    for (int64_t b = part.b0; b < part.b1; ++b) {
        for (int32_t h = part.h0; h < part.h1; ++h) {
            const Layout & l     = layout(h);
            uint8_t *      block = block_of(part.stream, b, h);
            for (int32_t c = 0; c < cells_in(b); ++c) {
                std::memcpy(before, block, l.block_bytes);
                read_key(part.stream, b * FASA_BLOCK_CELLS + c, h, key);
                l.write(key, block, c);
                failures += std::memcmp(before, block, l.block_bytes) != 0 ? 1 : 0;
            }
        }
    }
    return failures;
}

int64_t SideIndex::block_bytes() const {
    int64_t bytes = 0;
    for (int32_t h = 0; h < n_head_kv_; ++h) {
        bytes += layout(h).block_bytes;
    }
    return bytes;
}

int64_t SideIndex::bytes() const { return static_cast<int64_t>(dirty_.size()) * block_bytes(); }

} // namespace fasa
