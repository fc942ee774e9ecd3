// A profile as the core uses it: one layout per layer and KV head, at the n_fc in force.
#pragma once

#include <memory>
#include <vector>

#include "layout.h"

namespace fasa {

struct Profile {
    int32_t n_layer   = 0;
    int32_t n_head_kv = 0;
    int32_t head_dim  = 0;

    explicit Profile(const fasa_profile & source);

    // Layouts at n_fc chunks (0: all ranked) and `bits` bits (0: those of the profile); [n_layer][n_head_kv], with an
    // empty row for a layer that stays dense.
    using Layouts = std::vector<std::vector<Layout>>;
    std::shared_ptr<const Layouts> layouts(int32_t n_fc, int32_t bits) const;

  private:
    int32_t               n_rot_, rope_, n_ranked_;
    std::vector<uint16_t> chunks_;
    std::vector<uint8_t>  bits_;
    std::vector<float>    center_, scale_;
};

} // namespace fasa
