#include "sliding_window.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "half.h"
#include "plan.h"

namespace fasa {

namespace {

// Cells that the last row of each stream sees; -1: not known before the graph runs.
int64_t last_rows_see(const ggml_tensor * node, const SlidingWindows::Read & read) {
    if (!mask_is_input(node)) {
        return -1;
    }
    const ggml_tensor *   mask   = node->src[3];
    const int64_t         n_rows = node->src[0]->ne[1];
    std::vector<uint16_t> row(static_cast<size_t>(mask->ne[0]));
    int64_t               n = 0;
    for (int64_t stream = 0; stream < mask->ne[3]; ++stream) {
        const size_t offset = stream * mask->nb[3] + (n_rows - 1) * mask->nb[1];
        if (!read(mask, offset, row.size() * sizeof(uint16_t), row.data())) {
            return -1;
        }
        n += mask->ne[0] - std::count(row.begin(), row.end(), kHalfMinusInf);
    }
    return n;
}

} // namespace

bool SlidingWindows::read_host(const ggml_tensor * mask, size_t offset, size_t bytes, void * out) {
    if (!on_host(mask)) {
        return false;
    }
    std::memcpy(out, static_cast<const char *>(mask->data) + offset, bytes);
    return true;
}

bool SlidingWindows::learn(ggml_cgraph * graph, const Read & read, int64_t max_rows) {
    struct Seen {
        int32_t             layer;
        const ggml_tensor * node;
        const ggml_tensor * mask;
    };
    std::vector<Seen> seen;
    bool              unknown = false;
    int64_t           n_rows = 0, n_kv = 0;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node  = ggml_graph_node(graph, i);
        int32_t             layer = 0;
        if (node->op == GGML_OP_FLASH_ATTN_EXT && cache_root(before_cast(node->src[1]), &layer) != nullptr &&
            node->src[3] != nullptr && !selects_by_itself(node)) {
            seen.push_back({layer, node, node->src[3]});
            unknown = unknown || layers_.count(layer) == 0;
            n_rows  = std::max(n_rows, node->src[0]->ne[1]);
            n_kv    = std::max(n_kv, node->src[3]->ne[0]);
        }
    }
    const bool several = std::any_of(seen.begin(), seen.end(), [&](const Seen & s) { return s.mask != seen[0].mask; });
    bool       news    = several && suspect();
    if (!several || !unknown || (n_rows <= max_rows && n_kv == n_kv_read_)) {
        return news;
    }
    n_kv_read_ = n_kv;
    std::unordered_map<const ggml_tensor *, int64_t> cells;
    int64_t                                          most  = 0;
    int64_t                                          least = INT64_MAX;
    for (const Seen & s : seen) {
        if (cells.count(s.mask) == 0) {
            cells[s.mask] = last_rows_see(s.node, read);
        }
        most  = std::max(most, cells[s.mask]);
        least = cells[s.mask] < 0 ? least : std::min(least, cells[s.mask]);
    }
    for (const Seen & s : seen) {
        if (least < most && cells[s.mask] >= 0) {
            const bool window = cells[s.mask] < most;
            const auto at     = layers_.find(s.layer);
            news              = news || at == layers_.end() || at->second != window;
            layers_[s.layer]  = window;
        }
    }
    return news;
}

bool SlidingWindows::contains(int32_t layer) const {
    const auto it = layers_.find(layer);
    return several_masks_ && (it == layers_.end() || it->second);
}

bool SlidingWindows::suspect() {
    const bool news = !several_masks_;
    several_masks_  = true;
    return news;
}

} // namespace fasa
