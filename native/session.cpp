#include "session.h"

#include <algorithm>
#include <cstring>

#include "backend.h"
#include "clock.h"
#include "hadamard.h"
#include "status.h"

namespace fasa {

namespace {

static_assert(sizeof(fasa_counters::nodes) / sizeof(int64_t) == FASA_REASON_COUNT, "a counter per reason");

bool is_view_op(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

} // namespace

void check_config(const fasa_config & c) {
    if (c.budget < 1) {
        fail(FASA_STATUS_ARGUMENT, "budget is %d; it must be at least 1 cell.", c.budget);
    }
    if (c.n_fc < 0 || c.n_fc > FASA_MAX_HEAD_DIM / 2) {
        fail(FASA_STATUS_ARGUMENT, "n_fc is %d; 1 to %d chunks, or 0 for all that the profile ranks.", c.n_fc,
             FASA_MAX_HEAD_DIM / 2);
    }
    if (c.min_ctx < 0 || c.sinks < 0 || c.recent < 0) {
        fail(FASA_STATUS_ARGUMENT, "min_ctx is %d, sinks %d, recent %d; none may be negative.", c.min_ctx, c.sinks,
             c.recent);
    }
    if (static_cast<int64_t>(c.sinks) + c.recent > c.budget) {
        fail(FASA_STATUS_ARGUMENT, "sinks %d and recent %d together exceed the budget %d; raise budget or lower them.",
             c.sinks, c.recent, c.budget);
    }
}

void Session::refuse_while_running(const char * what) const {
    if (running_) {
        fail(FASA_STATUS_STATE, "%s cannot change while a graph is running; do it after the decode call.", what);
    }
}

Session::Session(const fasa_profile * profile, const fasa_config & config) {
    set_profile(profile);
    configure(config);
}

void Session::set_profile(const fasa_profile * profile) {
    auto fresh = profile != nullptr ? std::make_unique<Profile>(*profile) : nullptr;
    auto lay   = fresh != nullptr ? fresh->layouts(0) : nullptr;

    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    refuse_while_running("The profile");
    profile_ = std::move(fresh);
    layouts_ = std::move(lay);
    if (profile_ != nullptr && config_.n_fc > 0) {
        layouts_ = profile_->layouts(config_.n_fc);
    }
}

void Session::configure(const fasa_config & config) {
    check_config(config);
    const Kernels & kernels = kernels_of(config.isa);

    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    refuse_while_running("The configuration");
    if (profile_ != nullptr && config.n_fc != config_.n_fc) {
        layouts_ = profile_->layouts(config.n_fc);
    }
    config_  = config;
    kernels_ = &kernels;
}

// ---- around a graph ------------------------------------------------------------------------------------

ggml_status Session::compute(ggml_backend_t backend, ggml_cgraph * graph, GraphCompute inner) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const int64_t                               start = now_ns();
    try {
        scan(graph);
        reserve_scratch();
        find_forced();
        complete_work();
    } catch (const std::exception &) { // no memory for work space: everything dense, and counted
        for (auto & entry : layers_) { // the scan may have ended before it saw all writes
            if (entry.second.index != nullptr) {
                entry.second.index->mark_all();
            }
        }
        for (const NodeWork & w : work_) {
            ++counters_.nodes[FASA_REASON_NO_MEMORY];
            --counters_.nodes[w.index == nullptr ? FASA_REASON_CAPTURE : FASA_REASON_SPARSE];
        }
        work_.clear();
    }
    replace();
    const int64_t planned    = now_ns();
    running_                 = true;
    const ggml_status status = inner(backend, graph);
    running_                 = false;
    restore();

    for (const NodeWork & w : work_) {
        if (w.index != nullptr && status == GGML_STATUS_SUCCESS) {
            w.index->clear_marks(w.plan.visible->n_block);
        }
    }
    for (const Write & write : late_) {
        mark(*write.index, write.node);
    }
    if (!work_.empty()) {
        timings_.plan += planned - start;
        timings_.total += now_ns() - start;
    }
    ++counters_.graphs;
    work_.clear();
    forced_.clear();
    late_.clear();
    masks_.clear();
    return status;
}

// Everything that must be known before the graph runs: which nodes are replaced and which cells of K are rewritten.
void Session::scan(ggml_cgraph * graph) {
    const int             n_nodes = ggml_graph_n_nodes(graph);
    ggml_tensor * const * nodes   = ggml_graph_nodes(graph);
    for (int i = 0; i < n_nodes; ++i) {
        ggml_tensor * node = nodes[i];
        if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || is_view_op(node)) {
            continue;
        }
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            ++counters_.nodes[prepare(node)];
        } else if (node->view_src != nullptr) {
            note_write(node);
        }
    }
}

fasa_reason Session::prepare(ggml_tensor * node) {
    Plan                p{};
    const fasa_reason   reason = plan(node, profile_.get(), layouts_.get(), config_, masks_, &p);
    const ggml_tensor * k      = node->src[1];
    const ggml_tensor * v      = node->src[2];
    // K of another device has no address here.
    if (p.k_root == nullptr || p.k_root->buffer == nullptr || !ggml_backend_buffer_is_host(p.k_root->buffer)) {
        return reason;
    }
    if (!watch_buffer(p.k_root->buffer, this)) {
        return FASA_REASON_NO_CACHE;
    }
    Layer & layer     = layers_[p.layer];
    layer.k_root      = p.k_root;
    layer.kv          = {};
    layer.kv.k        = k->data;
    layer.kv.k_stride = static_cast<int64_t>(k->nb[1]);
    layer.kv.k_type   = k->type;
    layer.kv.k_dim    = static_cast<int32_t>(k->ne[0]);
    layer.head_bytes  = static_cast<int64_t>(k->nb[2]);
    layer.n_kv        = k->ne[1];
    layer.n_head_kv   = p.n_head_kv;
    layer.rotation    = p.rotation;
    layer.buffer      = p.k_root->buffer;
    layer.kv_bytes    = static_cast<int64_t>(ggml_nbytes(p.k_root)) +
                        (v->view_src != nullptr ? static_cast<int64_t>(ggml_nbytes(v->view_src)) : 0);
    if (reason != FASA_REASON_SPARSE && reason != FASA_REASON_CAPTURE) {
        return reason;
    }
    NodeWork w{};
    w.node = node;
    w.plan = p;
    std::memcpy(&w.scale, node->op_params + 0, sizeof(float));
    std::memcpy(&w.softcap, node->op_params + 2, sizeof(float));
    if (reason == FASA_REASON_SPARSE) {
        if (layer.index == nullptr || !layer.index->serves(node, p, layouts_.get())) {
            try {
                layer.index.reset(); // both at once could be the one that does not fit
                layer.index = std::make_unique<SideIndex>(node, p, layouts_);
            } catch (const std::bad_alloc &) {
                return FASA_REASON_NO_MEMORY;
            }
        }
        w.index = layer.index.get();
    }
    work_.push_back(w);
    return reason;
}

// A node that writes into the K cache of an indexed layer. Marks made now are seen by the attention node of the same
// graph; a write that comes after that node is marked again when the graph is done.
void Session::note_write(const ggml_tensor * node) {
    for (auto & entry : layers_) {
        SideIndex * index = entry.second.index.get();
        if (index == nullptr || index->root() != node->view_src) {
            continue;
        }
        mark(*index, node);
        counters_.stale_events += node->op != GGML_OP_SET_ROWS ? 1 : 0;
        const bool attended =
            std::any_of(work_.begin(), work_.end(), [&](const NodeWork & w) { return w.index == index; });
        if (attended) {
            late_.push_back({index, node});
        }
    }
}

void Session::mark(SideIndex & index, const ggml_tensor * node) {
    const ggml_tensor * rows = node->op == GGML_OP_SET_ROWS ? node->src[1] : nullptr;
    // Row numbers are known before the graph runs only when they are an input in host memory.
    if (rows == nullptr || node->view_offs != 0 || rows->type != GGML_TYPE_I64 || rows->op != GGML_OP_NONE ||
        rows->data == nullptr || (rows->buffer != nullptr && !ggml_backend_buffer_is_host(rows->buffer))) {
        index.mark_all();
        return;
    }
    const auto * cells = static_cast<const int64_t *>(rows->data);
    for (int64_t i = 0; i < rows->ne[0]; ++i) {
        index.mark_cell(cells[i]);
    }
}

void Session::reserve_scratch() {
    int64_t n_head  = 0;
    int64_t n_block = 0;
    for (const NodeWork & w : work_) {
        n_head  = std::max<int64_t>(n_head, w.plan.n_head);
        n_block = std::max(n_block, (w.node->src[1]->ne[1] + FASA_BLOCK_CELLS - 1) / FASA_BLOCK_CELLS);
    }
    if (n_head > 0) {
        scratch_.reserve(n_head, n_block);
    }
}

void Session::find_forced() {
    forced_.assign(work_.size(), {});
    for (size_t i = 0; i < work_.size(); ++i) {
        const Visible * visible = work_[i].plan.visible;
        if (visible == nullptr) {
            continue;
        }
        if (i > 0 && work_[i - 1].plan.visible == visible) {
            forced_[i] = forced_[i - 1];
            continue;
        }
        std::vector<int32_t> & forced = forced_[i];
        const auto             seen   = [&](int64_t c) { return (visible->words[c / 64] >> (c % 64) & 1u) != 0; };
        const int64_t          n_cell = visible->n_block * FASA_BLOCK_CELLS;
        for (int64_t c = 0; c < n_cell && static_cast<int32_t>(forced.size()) < config_.sinks; ++c) {
            if (seen(c)) {
                forced.push_back(static_cast<int32_t>(c));
            }
        }
        int32_t left = config_.recent;
        for (int64_t c = n_cell - 1; c >= 0 && left > 0; --c) {
            if (seen(c)) {
                forced.push_back(static_cast<int32_t>(c));
                --left;
            }
        }
    }
}

void Session::complete_work() {
    saved_.resize(work_.size());
    for (size_t i = 0; i < work_.size(); ++i) {
        NodeWork & w          = work_[i];
        w.kernels             = kernels_;
        w.config              = &config_;
        w.forced              = &forced_[i];
        w.scratch             = &scratch_;
        w.barrier             = &barrier_;
        w.timings             = &timings_;
        w.n_attended          = &n_attended_;
        w.bytes_attended      = &bytes_attended_;
        w.n_indexed           = &n_indexed_;
        w.n_verify_failures   = &n_verify_failures_;
        const ggml_tensor * q = w.node->src[0];
        if (w.index == nullptr) {
            Captured &   c   = captured_[w.plan.layer];
            const size_t old = c.rows.size();
            c.head_dim       = static_cast<int32_t>(q->ne[0]);
            c.n_head         = w.plan.n_head;
            c.rows.resize(old + q->ne[0] * q->ne[1] * q->ne[2]);
            w.captured = c.rows.data() + old;
        } else {
            const int64_t cells = w.plan.visible->n_cell * w.plan.n_head;
            counters_.cells_visible += cells;
            counters_.bytes_scored += w.plan.visible->n_block * w.index->block_bytes();
            counters_.cells_verified += config_.verify != 0 ? w.plan.visible->n_cell : 0;
        }
    }
}

void Session::replace() {
    for (size_t i = 0; i < work_.size(); ++i) {
        NodeWork & w     = work_[i];
        Saved &    saved = saved_[i];
        saved.op         = w.node->op;
        std::memcpy(saved.op_params, w.node->op_params, sizeof(saved.op_params));
        const seam::CustomOp op = {run_node, GGML_N_TASKS_MAX, &w};
        static_assert(sizeof(op) <= sizeof(saved.op_params), "op_params must hold a custom op");
        w.node->op = GGML_OP_CUSTOM;
        std::memcpy(w.node->op_params, &op, sizeof(op));
    }
}

void Session::restore() {
    for (size_t i = 0; i < work_.size(); ++i) {
        work_[i].node->op = saved_[i].op;
        std::memcpy(work_[i].node->op_params, saved_[i].op_params, sizeof(saved_[i].op_params));
    }
}

// ---- what the decorated buffer reports -----------------------------------------------------------------

void Session::bytes_written(const void * first, size_t size) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    for (auto & entry : layers_) {
        if (entry.second.index != nullptr) {
            counters_.stale_events += entry.second.index->mark_bytes(first, size) ? 1 : 0;
        }
    }
}

void Session::buffer_freed(ggml_backend_buffer_t buffer) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    for (auto it = layers_.begin(); it != layers_.end();) {
        it = it->second.buffer == buffer ? layers_.erase(it) : std::next(it);
    }
}

// ---- reading ----------------------------------------------------------------------------------------------

fasa_counters Session::counters() const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    fasa_counters                               c = counters_;
    c.cells_attended                              = n_attended_;
    c.bytes_attended                              = bytes_attended_;
    c.cells_indexed                               = n_indexed_;
    c.verify_failures                             = n_verify_failures_;
    for (const auto & entry : layers_) {
        if (entry.second.index != nullptr) {
            c.index_bytes += entry.second.index->bytes();
            c.kv_bytes += entry.second.kv_bytes;
        }
    }
    return c;
}

fasa_timings Session::timings() const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    return timings_;
}

void Session::reset() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    counters_          = {};
    timings_           = {};
    n_attended_        = 0;
    bytes_attended_    = 0;
    n_indexed_         = 0;
    n_verify_failures_ = 0;
}

void Session::invalidate() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    refuse_while_running("The side index");
    for (auto & entry : layers_) {
        entry.second.index.reset();
    }
}

void Session::captured(int32_t layer, int32_t * head_dim, int32_t * n_head, int64_t * n_rows, float * out) const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const auto                                  it = captured_.find(layer);
    if (it == captured_.end()) {
        fail(FASA_STATUS_STATE, "Layer %d has no captured queries; set capture and evaluate tokens first.", layer);
    }
    const Captured & c = it->second;
    *head_dim          = c.head_dim;
    *n_head            = c.n_head;
    *n_rows            = static_cast<int64_t>(c.rows.size()) / std::max(1, c.head_dim * c.n_head);
    if (out != nullptr) {
        std::copy(c.rows.begin(), c.rows.end(), out);
    }
}

void Session::captured_clear() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    refuse_while_running("The capture");
    captured_.clear();
}

void Session::keys(int32_t layer, int64_t c0, int64_t c1, float * out) const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const auto                                  it = layers_.find(layer);
    if (it == layers_.end()) {
        fail(FASA_STATUS_STATE, "Layer %d has not computed attention in this context yet; evaluate tokens first.",
             layer);
    }
    const Layer & l = it->second;
    if (c0 < 0 || c1 < c0 || c1 > l.n_kv) {
        fail(FASA_STATUS_ARGUMENT, "Cells %lld to %lld are asked for; the layer's last graph saw %lld.",
             static_cast<long long>(c0), static_cast<long long>(c1), static_cast<long long>(l.n_kv));
    }
    if (kv_row_bytes(l.kv.k_type, l.kv.k_dim) == 0) {
        fail(FASA_STATUS_ARGUMENT, "K of layer %d has type %d; keys can be read as f16 and q8_0.", layer, l.kv.k_type);
    }
    for (int64_t c = c0; c < c1; ++c) {
        for (int32_t h = 0; h < l.n_head_kv; ++h) {
            float * key = out + ((c - c0) * l.n_head_kv + h) * l.kv.k_dim;
            kv_to_float(l.kv.k_type, static_cast<const char *>(l.kv.k) + c * l.kv.k_stride + h * l.head_bytes,
                        l.kv.k_dim, key);
            undo_rotation(key, l.kv.k_dim, l.rotation);
        }
    }
}

} // namespace fasa
