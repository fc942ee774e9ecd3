#include "side_index.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "hadamard.h"
#include "kernels.h"

namespace fasa {

template <typename T> Aligned<T> make_aligned(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    void *       p     = std::aligned_alloc(64, std::max<size_t>(bytes, 64));
    if (p == nullptr) {
        throw std::bad_alloc();
    }
    std::memset(p, 0, bytes);
    return Aligned<T>(static_cast<T *>(p));
}

template Aligned<uint8_t> make_aligned<uint8_t>(int64_t);
template Aligned<float>   make_aligned<float>(int64_t);
template Aligned<int32_t> make_aligned<int32_t>(int64_t);

SideIndex::SideIndex(const ggml_tensor * node, const Plan & plan, std::shared_ptr<const Profile::Layouts> layouts)
    : root_(plan.k_root), root_data_(plan.k_root->data), layer_(plan.layer), n_head_kv_(plan.n_head_kv),
      head_dim_(static_cast<int32_t>(node->src[1]->ne[0])), type_(node->src[1]->type), rotation_(plan.rotation),
      n_cell_(root_->ne[1] * root_->ne[2]), row_bytes_(static_cast<int64_t>(root_->nb[1])),
      head_bytes_(static_cast<int64_t>(node->src[1]->nb[2])),
      first_block_(static_cast<int64_t>(node->src[1]->view_offs) / row_bytes_ / FASA_BLOCK_CELLS),
      layouts_(std::move(layouts)) {
    const int64_t n_block = (n_cell_ + FASA_BLOCK_CELLS - 1) / FASA_BLOCK_CELLS;
    for (int32_t h = 0; h < n_head_kv_; ++h) {
        data_.push_back(make_aligned<uint8_t>(n_block * layout(h).block_bytes));
    }
    dirty_.assign(n_block, ~uint64_t{0});
}

bool SideIndex::serves(const ggml_tensor * node, const Plan & plan, const Profile::Layouts * layouts) const {
    return root_ == plan.k_root && root_data_ == plan.k_root->data && layouts_.get() == layouts &&
           n_cell_ == root_->ne[1] * root_->ne[2] && type_ == static_cast<int32_t>(node->src[1]->type) &&
           rotation_ == plan.rotation && row_bytes_ == static_cast<int64_t>(root_->nb[1]) &&
           head_bytes_ == static_cast<int64_t>(node->src[1]->nb[2]) &&
           first_block_ == static_cast<int64_t>(node->src[1]->view_offs) / row_bytes_ / FASA_BLOCK_CELLS;
}

void SideIndex::mark_all() { std::fill(dirty_.begin(), dirty_.end(), ~uint64_t{0}); }

void SideIndex::mark_cell(int64_t cell) {
    if (cell >= 0 && cell < n_cell_) {
        dirty_[cell / FASA_BLOCK_CELLS] |= uint64_t{1} << (cell % FASA_BLOCK_CELLS);
    }
}

bool SideIndex::mark_bytes(const void * first, size_t size) {
    const int64_t begin = static_cast<const char *>(first) - static_cast<const char *>(root_data_);
    const int64_t end   = begin + static_cast<int64_t>(size);
    if (end <= 0 || begin >= n_cell_ * row_bytes_) {
        return false;
    }
    for (int64_t c = std::max<int64_t>(0, begin / row_bytes_); c < n_cell_ && c * row_bytes_ < end; ++c) {
        mark_cell(c);
    }
    return true;
}

void SideIndex::clear_marks(int64_t n_block) { std::fill_n(dirty_.begin() + first_block_, n_block, uint64_t{0}); }

void SideIndex::read_key(int64_t cell, int32_t head, float * out) const {
    const char * row = static_cast<const char *>(root_data_) + (first_block_ * FASA_BLOCK_CELLS + cell) * row_bytes_;
    kv_to_float(type_, row + head * head_bytes_, head_dim_, out);
    undo_rotation(out, head_dim_, rotation_);
}

int64_t SideIndex::refresh(const Part & part) {
    int64_t n = 0;
    float   key[FASA_MAX_HEAD_DIM];
    for (int64_t b = part.b0; b < part.b1; ++b) {
        for (uint64_t bits = dirty_[first_block_ + b]; bits != 0; bits &= bits - 1) {
            const int32_t c    = __builtin_ctzll(bits);
            const int64_t cell = b * FASA_BLOCK_CELLS + c;
            if (first_block_ * FASA_BLOCK_CELLS + cell >= n_cell_) {
                break;
            }
            for (int32_t h = part.h0; h < part.h1; ++h) {
                read_key(cell, h, key);
                layout(h).write(key, data_[h].get() + (first_block_ + b) * layout(h).block_bytes, c);
            }
            ++n;
        }
    }
    return n;
}

int64_t SideIndex::verify(const Part & part) {
    int64_t              failures = 0;
    float                key[FASA_MAX_HEAD_DIM];
    std::vector<uint8_t> before;
    for (int64_t b = part.b0; b < part.b1; ++b) {
        for (int32_t h = part.h0; h < part.h1; ++h) {
            const Layout & l     = layout(h);
            uint8_t *      block = data_[h].get() + (first_block_ + b) * l.block_bytes;
            for (int32_t c = 0; c < FASA_BLOCK_CELLS; ++c) {
                const int64_t cell = b * FASA_BLOCK_CELLS + c;
                if (first_block_ * FASA_BLOCK_CELLS + cell >= n_cell_) {
                    break;
                }
                before.assign(block, block + l.block_bytes);
                read_key(cell, h, key);
                l.write(key, block, c);
                failures += std::memcmp(before.data(), block, before.size()) != 0 ? 1 : 0;
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
