#include "sliding_window.h"

#include <algorithm>
#include <vector>

#include "half.h"
#include "plan.h"

namespace fasa {

namespace {

// Cells that the last row of each stream sees.
int64_t last_rows_see(const ggml_tensor * mask, int64_t n_rows) {
    int64_t n = 0;
    for (int64_t stream = 0; stream < mask->ne[3]; ++stream) {
        const auto * row = reinterpret_cast<const uint16_t *>(static_cast<const char *>(mask->data) +
                                                              stream * mask->nb[3] + (n_rows - 1) * mask->nb[1]);
        n += mask->ne[0] - std::count(row, row + mask->ne[0], kHalfMinusInf);
    }
    return n;
}

} // namespace

void SlidingWindows::learn(ggml_cgraph * graph) {
    struct Seen {
        int32_t             layer;
        const ggml_tensor * mask;
        int64_t             n_rows;
    };
    std::vector<Seen> seen;
    bool              news = false;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node  = ggml_graph_node(graph, i);
        int32_t             layer = 0;
        if (node->op == GGML_OP_FLASH_ATTN_EXT && cache_root(before_cast(node->src[1]), &layer) != nullptr &&
            mask_is_readable(node)) {
            seen.push_back({layer, node->src[3], node->src[0]->ne[1]});
            news = news || layers_.count(layer) == 0;
        }
    }
    const bool several = std::any_of(seen.begin(), seen.end(), [&](const Seen & s) { return s.mask != seen[0].mask; });
    several_masks_     = several_masks_ || several;
    if (!several || !news) {
        return;
    }
    std::unordered_map<const ggml_tensor *, int64_t> cells;
    int64_t                                          most  = 0;
    int64_t                                          least = INT64_MAX;
    for (const Seen & s : seen) {
        if (cells.count(s.mask) == 0) {
            cells[s.mask] = last_rows_see(s.mask, s.n_rows);
        }
        most  = std::max(most, cells[s.mask]);
        least = std::min(least, cells[s.mask]);
    }
    for (const Seen & s : seen) {
        if (least < most) {
            layers_[s.layer] = cells[s.mask] < most;
        }
    }
}

bool SlidingWindows::contains(int32_t layer) const {
    const auto it = layers_.find(layer);
    return several_masks_ && (it == layers_.end() || it->second);
}

} // namespace fasa
