#include "profile.h"

#include <algorithm>

#include "status.h"

namespace fasa {

Profile::Profile(const fasa_profile & p)
    : n_layer(p.n_layer), n_head_kv(p.n_head_kv), head_dim(p.head_dim), n_rot_(p.n_rot), rope_(p.rope),
      n_ranked_(p.n_ranked) {
    if (n_layer < 1 || n_layer > 4096 || n_head_kv < 1 || n_head_kv > 1024) {
        fail(FASA_STATUS_ARGUMENT, "The profile has %d layers and %d KV heads; 1 to 4096 and 1 to 1024 are allowed.",
             n_layer, n_head_kv);
    }
    if (n_ranked_ < 1 || n_ranked_ > FASA_MAX_HEAD_DIM / 2) {
        fail(FASA_STATUS_ARGUMENT, "The profile ranks %d chunks; 1 to %d are allowed.", n_ranked_,
             FASA_MAX_HEAD_DIM / 2);
    }
    if (head_dim < 2 || head_dim > FASA_MAX_HEAD_DIM) {
        fail(FASA_STATUS_ARGUMENT, "The profile's heads have %d dims; 2 to %d are allowed.", head_dim,
             FASA_MAX_HEAD_DIM);
    }
    if (p.chunks == nullptr || p.bits == nullptr) {
        fail(FASA_STATUS_ARGUMENT, "The profile has no chunks or no bits; both arrays are needed.");
    }
    const size_t n_head    = static_cast<size_t>(n_layer) * n_head_kv;
    const size_t n_chunk   = n_head * n_ranked_;
    const size_t n_channel = n_head * head_dim;
    chunks_.assign(p.chunks, p.chunks + n_chunk);
    bits_.assign(p.bits, p.bits + n_chunk);
    if (p.center != nullptr) {
        center_.assign(p.center, p.center + n_channel);
    }
    if (p.scale != nullptr) {
        scale_.assign(p.scale, p.scale + n_channel);
    }
    layouts(0, 0); // every row is checked here, not in the middle of a graph
}

std::shared_ptr<const Profile::Layouts> Profile::layouts(int32_t n_fc, int32_t bits) const {
    auto                       result = std::make_shared<Layouts>(n_layer);
    const int32_t              limit  = n_fc > 0 ? std::min(n_fc, n_ranked_) : n_ranked_;
    const std::vector<uint8_t> same(n_ranked_, static_cast<uint8_t>(bits));
    for (int32_t il = 0; il < n_layer; ++il) {
        for (int32_t h = 0; h < n_head_kv; ++h) {
            const size_t    row = static_cast<size_t>(il) * n_head_kv + h;
            const uint8_t * own = bits_.data() + row * n_ranked_;
            const int32_t   n   = static_cast<int32_t>(std::find(own, own + limit, 0) - own);
            if (n == 0) {
                (*result)[il].clear(); // one head without chunks leaves the layer dense
                break;
            }
            (*result)[il].emplace_back(head_dim, n_rot_, rope_, n, chunks_.data() + row * n_ranked_,
                                       bits != 0 ? same.data() : own,
                                       center_.empty() ? nullptr : center_.data() + row * head_dim,
                                       scale_.empty() ? nullptr : scale_.data() + row * head_dim);
        }
    }
    return result;
}

} // namespace fasa
