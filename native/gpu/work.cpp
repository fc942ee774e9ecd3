// Work space of a graph's nodes in device memory, and what the kernels are told of each.
#include <algorithm>
#include <cstring>

#include "../kv_type.h"
#include "decoder.h"

namespace fasa::gpu {

namespace {

Rows rows_of(const ggml_tensor * t) {
    return {static_cast<const uint8_t *>(t->data),    static_cast<int64_t>(t->nb[1]), static_cast<int64_t>(t->nb[2]),
            static_cast<int64_t>(t->view_src->nb[2]), static_cast<int32_t>(t->type),  static_cast<int32_t>(t->ne[0])};
}

} // namespace

void Decoder::open(const void * memory) {
    if (stream_ == nullptr) {
        stream_ = std::make_shared<Stream>(api_, memory);
        fork_   = ggml_backend_event_new(ggml_backend_get_device(backend_));
        join_   = ggml_backend_event_new(ggml_backend_get_device(backend_));
        if (fork_ == nullptr || join_ == nullptr || seam::of(fork_)->device != ggml_backend_get_device(backend_)) {
            fail(FASA_STATUS_HOST, "The CUDA device of this llama.cpp makes no events that pyfasa knows.");
        }
    }
}

void Decoder::reserve(const fasa_config & config, Graph * out) {
    if (out->work.empty()) {
        return;
    }
    const int64_t max_selected = std::max(config.budget, config.min_ctx);
    int64_t       n_query = 0, n_block = 0, n_room = 0, n_row = 0, n_parts = 0, n_cells = 0;
    for (const Work & w : out->work) {
        const ggml_tensor * q   = w.node->src[0];
        const int64_t       own = q->ne[1] * q->ne[2] * q->ne[3];
        n_parts                 = std::max(n_parts, own * n_splits(config.budget, own) * (2 + w.plan.v->ne[0]));
        n_row                   = std::max(n_row, q->ne[1] * q->ne[3]);
        n_query                 = std::max(n_query, own);
        n_block                 = std::max(n_block, n_blocks(w.plan.k->ne[1]));
        // For a token the whole cache's at once: as n_kv grows, nothing moves, and no memory is missing half way.
        const int64_t n_cell = own == w.plan.n_head ? w.index->view(w.plan).n_cell : w.plan.k->ne[1];
        n_room               = std::max(n_room, own * n_blocks(n_cell));
        row_bytes_ = kv_row_bytes(w.plan.k->type, w.plan.k->ne[0]) + kv_row_bytes(w.plan.v->type, w.plan.v->ne[0]);
    }
    for (const Cells & c : out->cells) {
        n_cells = std::max(n_cells, c.at + ggml_nelements(c.tensor));
    }
    if (n_query * n_block * FASA_BLOCK_CELLS > UINT32_MAX) { // as score numbers them
        throw std::bad_alloc();
    }
    n_room     = std::max(n_room, n_query * n_block);
    bool moved = totals_.reserve(stream_, 4);
    moved |= new_cells_.reserve(stream_, n_cells);
    moved |= codes_.reserve(stream_, n_query * kMaxSlots);
    moved |= levels_.reserve(stream_, n_query * 2 * kSegments);
    moved |= scores_.reserve(stream_, n_room * FASA_BLOCK_CELLS);
    moved |= peaks_.reserve(stream_, n_room * (FASA_BLOCK_CELLS / kPeak));
    moved |= n_visible_.reserve(stream_, n_row);
    moved |= windows_.reserve(stream_, n_row);
    moved |= selected_.reserve(stream_, n_query * max_selected);
    moved |= n_selected_.reserve(stream_, n_query);
    moved |= parts_.reserve(stream_, n_parts);
    moved |= arrived_.reserve(stream_, n_query);
    moved |= norms_.reserve(stream_, n_query);
    moved |= thresholds_.reserve(stream_, n_query);
    moved |= marks_.reserve(stream_, n_room * (FASA_BLOCK_CELLS / 32));
    epoch_ += moved ? 1 : 0;
    for (Work & w : out->work) {
        w.args = arguments(w, *out, config);
    }
}

Node Decoder::arguments(const Work & w, const Graph & graph, const fasa_config & config) const {
    const ggml_tensor * node = w.node;
    const ggml_tensor * q    = node->src[0];
    const ggml_tensor * mask = node->src[3];
    Node                n    = {};
    n.q                      = static_cast<const float *>(q->data);
    n.q_row                  = static_cast<int64_t>(q->nb[1]);
    n.q_head                 = static_cast<int64_t>(q->nb[2]);
    n.q_stream               = static_cast<int64_t>(q->nb[3]);
    n.k                      = rows_of(w.plan.k);
    n.v                      = rows_of(w.plan.v);
    n.mask                   = static_cast<const uint8_t *>(mask->data);
    n.mask_row               = static_cast<int64_t>(mask->nb[1]);
    n.mask_stream            = static_cast<int64_t>(mask->nb[3]);
    n.sinks                  = node->src[4] != nullptr ? static_cast<const float *>(node->src[4]->data) : nullptr;
    n.out                    = static_cast<float *>(node->data);
    n.out_head               = static_cast<int64_t>(node->nb[1]);
    n.out_row                = static_cast<int64_t>(node->nb[2]);
    n.out_stream             = static_cast<int64_t>(node->nb[3]);
    n.n_kv                   = static_cast<int32_t>(w.plan.k->ne[1]);
    n.n_rows                 = static_cast<int32_t>(q->ne[1]);
    n.n_stream               = static_cast<int32_t>(q->ne[3]);
    n.n_head                 = w.plan.n_head;
    n.n_head_kv              = w.plan.n_head_kv;
    n.group                  = n.n_head / n.n_head_kv;
    std::memcpy(&n.scale, node->op_params + 0, sizeof(float));
    std::memcpy(&n.softcap, node->op_params + 2, sizeof(float));
    n.index        = w.index->view(w.plan);
    n.new_cells    = w.cells >= 0 ? new_cells_.get() + graph.cells[w.cells].at : nullptr;
    n.n_new        = w.cells >= 0 ? static_cast<int32_t>(ggml_nelements(graph.cells[w.cells].tensor)) : 0;
    n.budget       = config.budget;
    n.min_ctx      = config.min_ctx;
    n.n_first      = config.sinks;
    n.n_last       = config.recent;
    n.max_selected = std::max(config.budget, config.min_ctx);
    std::copy_n(w.ahead, kAhead, n.ahead);
    n.filters = w.index->filters();
    n.n_split = n_splits(config.budget, static_cast<int64_t>(n.n_head) * n.n_rows * n.n_stream);
    n.scratch = {codes_.get(), levels_.get(),    norms_.get(),   thresholds_.get(), scores_.get(),
                 peaks_.get(), n_visible_.get(), windows_.get(), selected_.get(),   n_selected_.get(),
                 parts_.get(), arrived_.get(),   marks_.get(),   totals_.get()};
    return n;
}

} // namespace fasa::gpu
