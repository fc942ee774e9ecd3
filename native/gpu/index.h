// The side index of one layer in device memory, and how much of it is up to date.
#pragma once

#include <ggml-backend.h>

#include <memory>
#include <vector>

#include "../plan.h"
#include "../write_order.h"
#include "memory.h"

namespace fasa::gpu {

// The layouts of a layer as the kernels want them; `n_block`: blocks of each head, through all streams.
std::vector<HeadLayout> head_layouts(const std::vector<Layout> & layouts, int32_t n_head_kv, int64_t n_block);

// The width of all chunks of all heads, or 0.
int32_t common_bits(const std::vector<HeadLayout> & heads);

// Whether kernels exist for the segments of a layer's heads.
bool has_kernels(const std::vector<Layout> & layouts, int32_t n_head_kv);

class DeviceIndex {
  public:
    DeviceIndex(const std::shared_ptr<Stream> & stream, const Plan & plan,
                std::shared_ptr<const Profile::Layouts> layouts);

    bool serves(const Plan & plan, const Profile::Layouts * layouts) const;

    void mark_all();
    bool mark_bytes(const void * first, size_t size); // an overwritten range of device memory; true if it touches K

    // Cells from the start of a stream that are up to date; what lies beyond has never been in sight since.
    int64_t & built(int64_t stream) { return built_[stream]; }

    Index    view(const Plan & plan) const;
    Filter * filters() const { return filters_.get(); }
    int64_t  bytes() const { return data_.size(); }
    int64_t  block_bytes() const { return block_bytes_; } // of all KV heads
    int32_t  max_block_bytes() const { return max_block_bytes_; }
    bool     is_in(ggml_backend_buffer_t buffer) const { return buffer_ == buffer; }

  private:
    CacheTensor                             root_;
    ggml_backend_buffer_t                   buffer_; // that holds it
    int64_t                                 blocks_per_stream_;
    int32_t                                 n_head_kv_, rotation_;
    std::shared_ptr<const Profile::Layouts> layouts_;
    Memory<HeadLayout>                      heads_;
    Memory<uint8_t>                         data_;
    Memory<Filter>                          filters_; // of up to FASA_MAX_ROWS rows of each head and stream
    int64_t                                 block_bytes_     = 0;
    int32_t                                 max_block_bytes_ = 0, bits_ = 0;
    std::vector<int64_t>                    built_; // by stream
};

} // namespace fasa::gpu
