// What a decode graph asks for: the attention nodes that are replaced, when their inputs are there, and what is written
// to a K cache.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../backend.h"
#include "decoder.h"

namespace fasa::gpu {

namespace {

constexpr int64_t kMaxNewCells = 4096; // of one SET_ROWS node in a decode graph

// Upstream's experiment with several streams reorders nodes around attention: not to be cut into segments.
bool upstream_reorders() {
    const char * value = std::getenv("GGML_CUDA_GRAPH_OPT");
    return value != nullptr && std::strcmp(value, "1") == 0;
}

// Whether llama.cpp may read which experts were chosen before it goes on, which no capture allows. For a few rows it
// has a kernel that reads them on the device, if the experts are quantized.
bool waits_for_device(const ggml_tensor * node) {
    constexpr int64_t kFewRows = 4; // on the oldest device and for any type
    return node->op == GGML_OP_MUL_MAT_ID && (node->ne[2] > kFewRows || !ggml_is_quantized(node->src[0]->type) ||
                                              node->type != GGML_TYPE_F32 || node->src[1]->type != GGML_TYPE_F32);
}

// From which node of the graph on, and no later than `at`, an input of node `at` is there.
int end_of(ggml_cgraph * graph, const ggml_tensor * input, int at) {
    while (is_view_op(input) && input->src[0] != nullptr) {
        input = input->src[0];
    }
    int i = at;
    while (i > 0 && ggml_graph_node(graph, i - 1) != input) {
        --i;
    }
    return input->op == GGML_OP_NONE ? 0 : i > 0 ? i : at;
}

// The weights that nodes behind `at` multiply by, in their order, as far as they lie whole in the device's own memory.
void find_ahead(ggml_cgraph * graph, int at, ggml_backend_buffer_type_t own, Piece out[kAhead]) {
    int n = 0;
    for (int i = at + 1; i < ggml_graph_n_nodes(graph) && n < kAhead; ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->op == GGML_OP_FLASH_ATTN_EXT || node->op == GGML_OP_MUL_MAT_ID) {
            return;
        }
        const ggml_tensor * w = node->op == GGML_OP_MUL_MAT ? node->src[0] : nullptr;
        if (w != nullptr && w->buffer != nullptr && ggml_backend_buffer_get_type(w->buffer) == own &&
            ggml_backend_buffer_get_usage(w->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS && ggml_is_contiguous(w)) {
            out[n++] = {static_cast<const uint8_t *>(w->data), static_cast<int64_t>(ggml_nbytes(w))};
        }
    }
}

} // namespace

void Decoder::scan(ggml_cgraph * graph, const Settings & s, Graph * out) {
    const int n_nodes = ggml_graph_n_nodes(graph);
    cells_of_layer_.clear();
    learn(graph, s);
    for (int i = 0; i < n_nodes; ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (!is_computed(node)) {
            continue;
        }
        out->waits |= waits_for_device(node);
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            ++out->counts.nodes[prepare(graph, i, s, out)];
        } else if (node->view_src != nullptr) {
            note_write(node, out);
        }
    }
}

// Masks are inputs that llama.cpp has copied to the device before the graph runs. Nothing is read once all layers of
// the graph are known, which they are after most prompts.
void Decoder::learn(ggml_cgraph * graph, const Settings & s) {
    const bool suspected = s.several_masks && sliding_.suspect();
    const auto reader    = [this](const ggml_tensor * mask, size_t offset, size_t bytes, void * out) {
        return read(mask, offset, bytes, out);
    };
    const bool learned = sliding_.learn(graph, reader, s.config.max_rows);
    epoch_ += suspected || learned ? 1 : 0;
    for (int i = 0; sliding_.several_masks() && i < ggml_graph_n_nodes(graph); ++i) { // it holds for these caches
        const ggml_tensor * node  = ggml_graph_node(graph, i);
        int32_t             layer = 0;
        const ggml_tensor * root  = node->op == GGML_OP_FLASH_ATTN_EXT ? cache_root(node->src[1], &layer) : nullptr;
        if (root != nullptr && root->buffer != nullptr) {
            watch_buffer(root->buffer, s.session);
        }
    }
}

bool Decoder::read(const ggml_tensor * mask, size_t offset, size_t bytes, void * out) {
    if (SlidingWindows::read_host(mask, offset, bytes, out)) {
        return true;
    }
    try {
        open(mask->data);
    } catch (const std::exception &) { // prepare_index() meets it again
        return false;
    }
    return fork() && api_->download(stream_->device(), out, static_cast<const char *>(mask->data) + offset, bytes) == 0;
}

// A node that writes into a K cache. Rows named by an index tensor reach the index with the attention node that follows
// in the same graph; every other write makes the whole layer stale.
void Decoder::note_write(const ggml_tensor * node, Graph * out) {
    int32_t layer = 0;
    if (cache_root(node, &layer) == nullptr) {
        return;
    }
    out->written.push_back(layer);
    if (sliding_.contains(layer)) { // its node stays llama.cpp's
        mark_stale(layer);
        return;
    }
    const ggml_tensor * rows = node->op == GGML_OP_SET_ROWS ? node->src[1] : nullptr;
    const bool known = rows != nullptr && node->view_offs == 0 && rows->type == GGML_TYPE_I64 &&
                       rows->op == GGML_OP_NONE && ggml_is_contiguous(rows) && ggml_nelements(rows) <= kMaxNewCells &&
                       cells_of_layer_.count(layer) == 0;
    if (!known) {
        mark_stale(layer);
        cells_of_layer_[layer] = -1;
        return;
    }
    size_t i = 0;
    while (i < out->cells.size() && out->cells[i].tensor != rows) {
        ++i;
    }
    if (i == out->cells.size()) {
        const int64_t at = out->cells.empty() ? 0 : out->cells.back().at + ggml_nelements(out->cells.back().tensor);
        out->cells.push_back({rows, at});
    }
    cells_of_layer_[layer] = static_cast<int32_t>(i);
}

fasa_reason Decoder::prepare(ggml_cgraph * graph, int at, const Settings & s, Graph * out) {
    ggml_tensor * node     = ggml_graph_node(graph, at);
    Work          w        = {};
    int32_t       of_layer = 0;
    cache_root(before_cast(node->src[1]), &of_layer);
    const PlanContext context{s.profile, s.layouts.get(), &s.config, nullptr, nullptr, true};
    const fasa_reason reason =
        upstream_reorders() ? FASA_REASON_DISABLED : plan(node, context, sliding_.contains(of_layer), &w.plan);
    const fasa_reason indexed = reason == FASA_REASON_SPARSE ? prepare_index(w.plan, s, *out) : reason;
    if (indexed != FASA_REASON_SPARSE) {
        return indexed;
    }
    const int32_t layer = w.plan.layer;
    const auto    cells = cells_of_layer_.find(layer);
    w.at                = at;
    w.ready_at          = std::max(end_of(graph, node->src[0], at), end_of(graph, node->src[3], at));
    w.node              = node;
    w.index             = indexes_[layer].get();
    find_ahead(graph, at, ggml_backend_dev_buffer_type(ggml_backend_get_device(backend_)), w.ahead);
    w.cells = cells != cells_of_layer_.end() ? cells->second : -1;
    out->written.erase(std::remove(out->written.begin(), out->written.end(), layer), out->written.end());
    out->counts.cells_indexed += w.cells >= 0 ? ggml_nelements(out->cells[w.cells].tensor) : 0;
    out->counts.bytes_scored += n_blocks(w.plan.k->ne[1]) * w.index->block_bytes() * node->src[0]->ne[3];
    out->work.push_back(std::move(w));
    return FASA_REASON_SPARSE;
}

// SPARSE when the layer's index serves the node.
fasa_reason Decoder::prepare_index(const Plan & plan, const Settings & s, const Graph & graph) {
    auto & index = indexes_[plan.layer];
    if (index != nullptr && index->serves(plan, s.layouts.get())) {
        return FASA_REASON_SPARSE;
    }
    if (index != nullptr &&
        std::any_of(graph.work.begin(), graph.work.end(), [&](const Work & w) { return w.index == index.get(); })) {
        return FASA_REASON_CACHE_VIEWS;
    }
    if (!has_kernels((*s.layouts)[plan.layer], plan.n_head_kv)) {
        return FASA_REASON_NO_PROFILE;
    }
    index.reset(); // both at once could be the one that does not fit
    ++epoch_;
    const std::pair<const void *, int64_t> key{plan.k_root->data, s.generation};
    if (too_large_.count(plan.layer) != 0 && too_large_[plan.layer] == key) {
        return FASA_REASON_NO_MEMORY;
    }
    if (!watch_buffer(plan.k_root->buffer, s.session)) {
        return FASA_REASON_NO_CACHE;
    }
    open(plan.k->data);
    try {
        index = std::make_unique<DeviceIndex>(stream_, plan, s.layouts);
    } catch (const std::bad_alloc &) {
        too_large_[plan.layer] = key;
        return FASA_REASON_NO_MEMORY;
    }
    kv_bytes_[plan.layer] = static_cast<int64_t>(ggml_nbytes(plan.k_root) + ggml_nbytes(plan.v->view_src));
    return FASA_REASON_SPARSE;
}

} // namespace fasa::gpu
