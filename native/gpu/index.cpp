#include "index.h"

#include <algorithm>

namespace fasa::gpu {

std::vector<HeadLayout> head_layouts(const std::vector<Layout> & layouts, int32_t n_head_kv, int64_t n_block) {
    std::vector<HeadLayout> heads(n_head_kv);
    int64_t                 first = 0;
    for (int32_t h = 0; h < n_head_kv; ++h) {
        const Layout & l = layouts[h];
        HeadLayout &   d = heads[h];
        d                = {};
        d.first          = first;
        d.block_bytes    = static_cast<int32_t>(l.block_bytes);
        d.n_slot         = l.n_slot();
        d.n_segment      = static_cast<int32_t>(l.segments.size());
        for (int32_t s = 0; s < d.n_segment; ++s) {
            const fasa::Segment & from = l.segments[s];
            d.segments[s]              = {from.bits, from.n_quad, from.slot, static_cast<int32_t>(from.offset)};
        }
        for (int32_t i = 0; i < d.n_slot; ++i) {
            d.dims[i]   = static_cast<int16_t>(l.dims[i]);
            d.center[i] = l.center[i];
            d.scale[i]  = l.scale[i];
        }
        first += n_block * l.block_bytes;
    }
    return heads;
}

int32_t common_bits(const std::vector<HeadLayout> & heads) {
    const int32_t bits = heads[0].segments[0].bits;
    const bool    same = std::all_of(heads.begin(), heads.end(), [bits](const HeadLayout & h) {
        return h.n_segment == 1 && h.segments[0].bits == bits;
    });
    return same ? bits : 0;
}

bool has_kernels(const std::vector<Layout> & layouts, int32_t n_head_kv) {
    for (int32_t h = 0; h < n_head_kv; ++h) {
        const Layout & l = layouts[h];
        if (l.segments.size() > kSegments || l.n_slot() > kMaxSlots) {
            return false;
        }
        for (const fasa::Segment & s : l.segments) {
            if (!width_exists(s.bits)) {
                return false;
            }
        }
    }
    return true;
}

DeviceIndex::DeviceIndex(const std::shared_ptr<Stream> & stream, const Plan & plan,
                         std::shared_ptr<const Profile::Layouts> layouts)
    : root_(*plan.k_root), buffer_(plan.k_root->buffer), blocks_per_stream_(n_blocks(root_.n_cell)),
      n_head_kv_(plan.n_head_kv), rotation_(plan.rotation), layouts_(std::move(layouts)), built_(root_.n_stream, 0) {
    const auto heads = head_layouts((*layouts_)[plan.layer], n_head_kv_, root_.n_stream * blocks_per_stream_);
    for (const HeadLayout & h : heads) {
        block_bytes_ += h.block_bytes;
        max_block_bytes_ = std::max(max_block_bytes_, h.block_bytes);
    }
    bits_  = common_bits(heads);
    heads_ = Memory<HeadLayout>(stream, n_head_kv_);
    data_  = Memory<uint8_t>(stream, root_.n_stream * blocks_per_stream_ * block_bytes_);
    const std::vector<Filter> none(plan.n_head * FASA_MAX_ROWS * root_.n_stream, Filter{kNoFilter, kNoFilter});
    filters_ = Memory<Filter>(stream, static_cast<int64_t>(none.size()));
    check(stream->api(),
          stream->api()->upload(stream->device(), filters_.get(), none.data(), none.size() * sizeof(Filter)),
          "prepare an index");
    check(stream->api(),
          stream->api()->upload(stream->device(), heads_.get(), heads.data(), heads.size() * sizeof(HeadLayout)),
          "copy the layout of an index");
}

bool DeviceIndex::serves(const Plan & plan, const Profile::Layouts * layouts) const {
    return root_ == CacheTensor(*plan.k_root) && layouts_.get() == layouts && n_head_kv_ == plan.n_head_kv &&
           rotation_ == plan.rotation;
}

void DeviceIndex::mark_all() { std::fill(built_.begin(), built_.end(), 0); }

bool DeviceIndex::mark_bytes(const void * first, size_t size) {
    const auto * begin = static_cast<const char *>(root_.data);
    const auto * at    = static_cast<const char *>(first);
    if (at + size <= begin || at >= begin + root_.row_bytes * root_.n_cell * root_.n_stream) {
        return false;
    }
    mark_all();
    return true;
}

Index DeviceIndex::view(const Plan & plan) const {
    return {data_.get(),  heads_.get(),   blocks_per_stream_, plan.first_stream,
            root_.n_cell, root_.n_stream, rotation_,          bits_};
}

} // namespace fasa::gpu
