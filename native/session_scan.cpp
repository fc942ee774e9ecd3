// What a session finds in a graph before it runs: nodes to replace, cells of K that are rewritten, casts that nobody
// reads.
#include <algorithm>
#include <cstring>

#include "backend.h"
#include "model_check.h"
#include "session.h"

namespace fasa {

namespace {

// The cells that a SET_ROWS node writes, i64 [n]; nullptr for other nodes, and where they are not known before the
// graph runs: they must be an input in host memory.
const ggml_tensor * row_numbers(const ggml_tensor * node) {
    const ggml_tensor * rows  = node->op == GGML_OP_SET_ROWS ? node->src[1] : nullptr;
    const bool          known = rows != nullptr && node->view_offs == 0 && rows->type == GGML_TYPE_I64 &&
                                rows->op == GGML_OP_NONE && rows->data != nullptr &&
                                (rows->buffer == nullptr || ggml_backend_buffer_is_host(rows->buffer));
    return known ? rows : nullptr;
}

} // namespace

// Everything that must be known before the graph runs: which nodes are replaced and which cells of K are rewritten.
void Session::scan(ggml_cgraph * graph) {
    masks_.clear();
    if (several_masks()) {
        windows_.suspect();
    }
    windows_.learn(graph);
    compare_model(graph);
    const int             n_nodes = ggml_graph_n_nodes(graph);
    ggml_tensor * const * nodes   = ggml_graph_nodes(graph);
    for (int i = 0; i < n_nodes; ++i) {
        ggml_tensor * node = nodes[i];
        if (!is_computed(node)) {
            continue;
        }
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            ++counters_.nodes[prepare(node)];
        } else if (node->view_src != nullptr) {
            note_write(node);
        }
    }
}

// Nodes of a model that is not the profile's: their cache is foreign from then on.
void Session::compare_model(ggml_cgraph * graph) {
    if (!tell_ || profile_ == nullptr) {
        return;
    }
    std::vector<bool> used(layouts_->size());
    std::transform(layouts_->begin(), layouts_->end(), used.begin(), [](const auto & row) { return !row.empty(); });
    const std::string missing = missing_layer(graph, used);
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node  = ggml_graph_node(graph, i);
        int32_t             layer = 0;
        const ggml_tensor * root =
            node->op == GGML_OP_FLASH_ATTN_EXT ? cache_root(before_cast(node->src[1]), &layer) : nullptr;
        // A window has frequencies of its own in some models, and is not served anyway.
        if (root == nullptr || foreign_.count(root->buffer) != 0 || windows_.contains(layer)) {
            continue;
        }
        const std::string found = missing.empty() ? difference(node, layer, model_) : missing;
        if (!found.empty()) {
            foreign_.insert(root->buffer);
            tell_(found);
        }
    }
}

fasa_reason Session::prepare(ggml_tensor * node) {
    NodeWork            w{};
    int32_t             of_layer = 0;
    const ggml_tensor * root     = cache_root(before_cast(node->src[1]), &of_layer);
    if (root != nullptr && foreign_.count(root->buffer) != 0) {
        return FASA_REASON_SHAPE; // before layers_, whose indexes may be those of another context's cache
    }
    const PlanContext   context = {profile_.get(), layouts_.get(), &config_, &masks_,
                                   root != nullptr ? order_of(root) : nullptr};
    const fasa_reason   reason  = plan(node, context, windows_.contains(of_layer), &w.plan);
    const ggml_tensor * k_root  = w.plan.k_root;
    if (context.order == nullptr) { // K of another device has no address here
        return reason;
    }
    const ggml_tensor * k     = w.plan.k;
    const ggml_tensor * v     = w.plan.v;
    Layer &             layer = layers_[w.plan.layer];
    layer.kv                  = {};
    layer.kv.k                = k->data;
    layer.kv.k_stride         = static_cast<int64_t>(k->nb[1]);
    layer.kv.k_type           = k->type;
    layer.kv.k_dim            = static_cast<int32_t>(k->ne[0]);
    layer.head_bytes          = static_cast<int64_t>(k->nb[2]);
    layer.n_kv                = k->ne[1];
    layer.n_head_kv           = w.plan.n_head_kv;
    layer.rotation            = w.plan.rotation;
    layer.buffer              = k_root->buffer;
    layer.kv_bytes            = static_cast<int64_t>(ggml_nbytes(k_root)) +
                                (v->view_src != nullptr ? static_cast<int64_t>(ggml_nbytes(v->view_src)) : 0);
    if (reason == FASA_REASON_SPARSE) {
        const fasa_reason index_reason = prepare_index(w.plan, layer);
        if (index_reason != FASA_REASON_SPARSE) {
            return index_reason;
        }
        w.index = layer.index.get();
    } else if (reason != FASA_REASON_CAPTURE) {
        return reason;
    }
    w.node = node;
    std::memcpy(&w.scale, node->op_params + 0, sizeof(float));
    std::memcpy(&w.softcap, node->op_params + 2, sizeof(float));
    work_.push_back(std::move(w));
    return reason;
}

// SPARSE when layer.index serves the node.
fasa_reason Session::prepare_index(const Plan & plan, Layer & layer) {
    if (layer.index != nullptr && layer.index->serves(plan, layouts_.get(), scorer_ != nullptr)) {
        return FASA_REASON_SPARSE;
    }
    const SideIndex * old = layer.index.get();
    if (old != nullptr && std::any_of(work_.begin(), work_.end(), [&](const NodeWork & w) { return w.index == old; })) {
        return FASA_REASON_CACHE_VIEWS;
    }
    try {
        layer.index.reset(); // both at once could be the one that does not fit
        layer.index = std::make_unique<SideIndex>(plan, layouts_, scorer_ != nullptr);
    } catch (const std::bad_alloc &) {
        return FASA_REASON_NO_MEMORY;
    }
    return FASA_REASON_SPARSE;
}

// A node that writes into the K cache of an indexed layer. Marks made now are seen by the attention node of the same
// graph; a write that comes after that node is marked again when the graph is done.
void Session::note_write(const ggml_tensor * node) {
    int32_t             layer = 0;
    const ggml_tensor * root  = cache_root(node, &layer);
    if (root == nullptr) {
        return;
    }
    const ggml_tensor * rows  = row_numbers(node);
    WriteOrder *        order = order_of(root);
    if (order != nullptr && order->follows(*root) && rows != nullptr) {
        for (int64_t i = 0; i < rows->ne[0]; ++i) {
            order->cell_written(static_cast<const int64_t *>(rows->data)[i]);
        }
    }
    const auto  it    = layers_.find(layer);
    SideIndex * index = it != layers_.end() ? it->second.index.get() : nullptr;
    if (index == nullptr || !index->is_of(*root)) {
        return;
    }
    mark(*index, node);
    counters_.stale_events += node->op != GGML_OP_SET_ROWS ? 1 : 0;
    const bool attended = std::any_of(work_.begin(), work_.end(), [&](const NodeWork & w) { return w.index == index; });
    if (attended) {
        late_.push_back({index, node});
    }
}

void Session::mark(SideIndex & index, const ggml_tensor * node) {
    const ggml_tensor * rows = row_numbers(node);
    if (rows == nullptr) {
        index.mark_all();
        return;
    }
    for (int64_t i = 0; i < rows->ne[0]; ++i) {
        index.mark_cell(static_cast<const int64_t *>(rows->data)[i]);
    }
}

// nullptr when the cache is not in host memory, or another session follows it.
WriteOrder * Session::order_of(const ggml_tensor * k_root) {
    const ggml_backend_buffer_t buffer = k_root->buffer;
    if (buffer == nullptr || !ggml_backend_buffer_is_host(buffer) || !watch_buffer(buffer, this)) {
        return nullptr;
    }
    return &orders_.try_emplace(buffer, k_root).first->second;
}

// Casts of K and V to f16 that only replaced nodes read: a copy of the whole cache per token, if they were computed.
void Session::find_idle_casts(ggml_cgraph * graph) {
    idle_casts_.clear();
    for (const NodeWork & w : work_) {
        for (ggml_tensor * t : {w.node->src[1], w.node->src[2]}) {
            if (before_cast(t) != t) {
                idle_casts_.push_back(t);
            }
        }
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph) && !idle_casts_.empty(); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (std::any_of(work_.begin(), work_.end(), [&](const NodeWork & w) { return w.node == node; })) {
            continue;
        }
        const auto reads = [&](const ggml_tensor * cast) {
            return node != cast &&
                   (node->view_src == cast || std::count(node->src, node->src + GGML_MAX_SRC, cast) > 0);
        };
        idle_casts_.erase(std::remove_if(idle_casts_.begin(), idle_casts_.end(), reads), idle_casts_.end());
    }
}

} // namespace fasa
