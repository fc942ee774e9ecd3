#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "../backend.h"
#include "../kv_type.h"

namespace fasa::gpu {

namespace {

Rows rows_of(const ggml_tensor * t) {
    return {static_cast<const uint8_t *>(t->data),    static_cast<int64_t>(t->nb[1]), static_cast<int64_t>(t->nb[2]),
            static_cast<int64_t>(t->view_src->nb[2]), static_cast<int32_t>(t->type),  static_cast<int32_t>(t->ne[0])};
}

} // namespace

Decoder::Decoder(const Api * api, ggml_backend_t backend) : api_(api), backend_(backend) {}

Decoder::~Decoder() {
    forget();
    if (fork_ != nullptr) {
        ggml_backend_event_free(fork_);
        ggml_backend_event_free(join_);
    }
}

ggml_status Decoder::compute(ggml_cgraph * graph, GraphCompute inner, const Settings & s) {
    Graph now;
    now.uid     = seam::uid_of(graph);
    now.config  = s.config;
    now.layouts = s.layouts;
    now.epoch   = epoch_;
    if (is_captured_ && s.config.verify == 0 && same_as_last(now) && is_built(last_)) {
        count(last_, s.counters);
        mark_written(last_);
        return launch() ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
    }
    try {
        scan(graph, s, &now);
        reserve(s.config, &now);
    } catch (const std::exception &) { // no memory, or no stream: everything dense, and counted
        now.counts.nodes[FASA_REASON_NO_MEMORY] += now.counts.nodes[FASA_REASON_SPARSE];
        now.counts.nodes[FASA_REASON_SPARSE] = 0;
        now.work.clear();
        invalidate(); // the scan may have ended before it saw all writes
    }
    now.epoch = epoch_;
    count(now, s.counters);
    if (now.work.empty()) {
        const ggml_status status = inner(backend_, graph);
        mark_written(now);
        return status;
    }
    const bool  verify = s.config.verify != 0;
    const bool  again  = same_as_last(now) && !verify && !now.has_experts;
    const bool  built  = is_built(now);
    ggml_status status = GGML_STATUS_FAILED;
    // A capture outlives a graph that only has to rebuild the index.
    is_captured_ = again && (is_captured_ || (built && capture(graph, inner, now)));
    if (is_captured_ && built) {
        status = launch() ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
    } else {
        status = copy_new_cells(now) ? segments(graph, inner, now, false, verify) : GGML_STATUS_FAILED;
    }
    mark_written(now);
    if (status != GGML_STATUS_SUCCESS) {
        invalidate();
        return status;
    }
    last_ = std::move(now);
    return status;
}

// ---- one graph and the next -------------------------------------------------------------------------------------

bool Decoder::same_as_last(const Graph & graph) const {
    return graph.uid != 0 && graph.uid == last_.uid && graph.epoch == last_.epoch && graph.layouts == last_.layouts &&
           std::memcmp(&graph.config, &last_.config, sizeof(fasa_config)) == 0;
}

void Decoder::count(const Graph & graph, fasa_counters * counters) const {
    for (int i = 0; i < FASA_REASON_COUNT; ++i) {
        counters->nodes[i] += graph.counts.nodes[i];
    }
    if (!graph.work.empty()) {
        counters->cells_indexed += graph.counts.cells_indexed;
        counters->bytes_scored += graph.counts.bytes_scored;
    }
}

void Decoder::mark_stale(int32_t layer) {
    const auto it = indexes_.find(layer);
    if (it != indexes_.end() && it->second != nullptr) {
        it->second->mark_all();
    }
}

void Decoder::mark_written(const Graph & graph) {
    for (const int32_t layer : graph.written) {
        mark_stale(layer);
    }
}

// ---- device memory ---------------------------------------------------------------------------------------------

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
    int64_t       n_query = 0, n_block = 0, n_row = 0, n_parts = 0, n_cells = 0;
    for (const Work & w : out->work) {
        const ggml_tensor * q   = w.node->src[0];
        const int64_t       own = q->ne[1] * q->ne[2] * q->ne[3];
        n_parts                 = std::max(n_parts, own * n_splits(config.budget, own) * (2 + w.plan.v->ne[0]));
        n_row                   = std::max(n_row, q->ne[1] * q->ne[3]);
        n_query                 = std::max(n_query, own);
        n_block                 = std::max(n_block, n_blocks(w.plan.k->ne[1]));
        row_bytes_ = kv_row_bytes(w.plan.k->type, w.plan.k->ne[0]) + kv_row_bytes(w.plan.v->type, w.plan.v->ne[0]);
    }
    for (const Cells & c : out->cells) {
        n_cells = std::max(n_cells, c.at + ggml_nelements(c.tensor));
    }
    if (n_query * n_block * FASA_BLOCK_CELLS > UINT32_MAX) { // as score numbers them
        throw std::bad_alloc();
    }
    bool moved = totals_.reserve(stream_, 4);
    moved |= new_cells_.reserve(stream_, n_cells);
    moved |= codes_.reserve(stream_, n_query * kMaxSlots);
    moved |= levels_.reserve(stream_, n_query * 2 * kSegments);
    moved |= scores_.reserve(stream_, n_query * n_block * FASA_BLOCK_CELLS);
    moved |= peaks_.reserve(stream_, n_query * n_block * (FASA_BLOCK_CELLS / kPeak));
    moved |= n_visible_.reserve(stream_, n_row);
    moved |= windows_.reserve(stream_, n_row);
    moved |= selected_.reserve(stream_, n_query * max_selected);
    moved |= n_selected_.reserve(stream_, n_query);
    moved |= parts_.reserve(stream_, n_parts);
    moved |= arrived_.reserve(stream_, n_query);
    moved |= norms_.reserve(stream_, n_query);
    moved |= thresholds_.reserve(stream_, n_query);
    moved |= marks_.reserve(stream_, n_query * n_block * (FASA_BLOCK_CELLS / 32));
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

// ---- running ----------------------------------------------------------

bool Decoder::is_built(const Graph & graph) const {
    for (const Work & w : graph.work) {
        for (int64_t i = 0; i < w.args.n_stream; ++i) {
            if (w.index->built(w.plan.first_stream + i) < w.args.n_kv) {
                return false;
            }
        }
    }
    return true;
}

bool Decoder::fork() {
    ggml_backend_event_record(fork_, backend_);
    return api_->wait_event(stream_->device(), seam::of(fork_)->context) == 0;
}

bool Decoder::join() {
    const bool recorded = api_->record_event(stream_->device(), seam::of(join_)->context) == 0;
    if (recorded) {
        ggml_backend_event_wait(backend_, join_);
    }
    return recorded;
}

bool Decoder::launch() { return fork() && api_->launch(stream_->device(), capture_) == 0 && join(); }

// The memory of an input may be used for something else before the last layer needs it.
bool Decoder::copy_new_cells(const Graph & graph) {
    bool ok = fork();
    for (const Cells & c : graph.cells) {
        ok = ok && api_->copy(stream_->device(), new_cells_.get() + c.at, c.tensor->data, ggml_nbytes(c.tensor)) == 0;
    }
    return ok && join();
}

// The index of all cells that the node sees, where parts of it are missing.
bool Decoder::build(const Work & w) {
    int64_t first = INT64_MAX;
    for (int64_t i = 0; i < w.args.n_stream; ++i) {
        first = std::min(first, w.index->built(w.plan.first_stream + i));
    }
    if (first >= w.args.n_kv) {
        return true;
    }
    for (int64_t i = 0; i < w.args.n_stream; ++i) {
        w.index->built(w.plan.first_stream + i) = w.args.n_kv;
    }
    return api_->rebuild(stream_->device(), &w.args, first / FASA_BLOCK_CELLS, w.index->max_block_bytes(), nullptr) ==
           0;
}

bool Decoder::choose(const Work & w) {
    Device * device = stream_->device();
    return api_->prepare(device, &w.args) == 0 && api_->score(device, &w.args) == 0 &&
           api_->select(device, &w.args) == 0;
}

// The graph cut at its replaced nodes. While we capture, llama.cpp must not capture a segment by itself, which it does
// when the segment comes twice without a change, also as part of another graph: a byte of padding in the segment's
// first node says which capture this is.
ggml_status Decoder::segments(ggml_cgraph * graph, GraphCompute inner, const Graph & scanned, bool capturing,
                              bool verify) {
    int        begin   = 0;
    const auto segment = [&](int end) {
        if (end == begin) {
            return GGML_STATUS_SUCCESS;
        }
        seam::Graph part = seam::part_of(graph, begin, end);
        if (capturing) {
            part.nodes[0]->padding[0] = static_cast<char>(n_captures_);
        }
        return inner(backend_, reinterpret_cast<ggml_cgraph *>(&part));
    };
    Device * device = stream_->device();
    for (const Work & w : scanned.work) {
        // Each further segment of a graph that is not captured costs launches.
        const bool early = capturing && w.ready_at > begin && w.ready_at < w.at;
        if (early) {
            const ggml_status status = segment(w.ready_at);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
            begin = w.ready_at;
            if (!fork() || !choose(w)) {
                return GGML_STATUS_FAILED;
            }
        }
        const ggml_status status = segment(w.at);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        begin   = w.at + 1;
        bool ok = fork();
        if (!early) {
            ok = ok && build(w) && api_->encode(device, &w.args) == 0;
            if (verify) {
                ok = ok && api_->rebuild(device, &w.args, 0, w.index->max_block_bytes(), totals_.get() + 2) == 0;
            }
            ok = ok && choose(w);
        }
        ok = ok && api_->attend(device, &w.args) == 0 && join();
        if (early) { // llama.cpp's next kernels do not wait for it
            ok = ok && api_->encode(device, &w.args) == 0;
        }
        if (!ok) {
            return GGML_STATUS_FAILED;
        }
    }
    return segment(ggml_graph_n_nodes(graph));
}

// Our stream begins and ends the capture; llama.cpp's joins it by its first event.
bool Decoder::capture(ggml_cgraph * graph, GraphCompute inner, const Graph & scanned) {
    Device * device = stream_->device();
    if (api_->begin_capture(device) != 0) {
        return false;
    }
    ++n_captures_;
    bool ok = true;
    for (const Cells & c : scanned.cells) {
        ok = ok && api_->copy(device, new_cells_.get() + c.at, c.tensor->data, ggml_nbytes(c.tensor)) == 0;
    }
    ok               = ok && join() && segments(graph, inner, scanned, true, false) == GGML_STATUS_SUCCESS && fork();
    const bool ended = api_->end_capture(device, &capture_) == 0;
    return ok && ended && capture_ != nullptr;
}

void Decoder::forget() {
    if (capture_ != nullptr) {
        api_->free_capture(capture_);
    }
    capture_     = nullptr;
    is_captured_ = false;
    last_        = {};
}

// ---- what the session passes on ----------------------------------------------------------------------------------

bool Decoder::bytes_written(const void * first, size_t size) {
    bool touched = false;
    for (auto & entry : indexes_) {
        touched = (entry.second != nullptr && entry.second->mark_bytes(first, size)) || touched;
    }
    return touched;
}

void Decoder::buffer_freed(ggml_backend_buffer_t buffer) {
    for (auto it = indexes_.begin(); it != indexes_.end();) {
        it = it->second == nullptr || it->second->is_in(buffer) ? indexes_.erase(it) : std::next(it);
    }
    sliding_ = indexes_.empty() ? SlidingWindows() : sliding_; // an rpc-server may get another model now
    forget();
    ++epoch_;
}

void Decoder::invalidate() {
    for (auto & entry : indexes_) {
        if (entry.second != nullptr) {
            entry.second->mark_all();
        }
    }
}

void Decoder::add_to(fasa_counters * c) const {
    int64_t totals[4] = {};
    if (totals_.get() != nullptr) {
        api_->download(stream_->device(), totals, totals_.get(), sizeof(totals));
    }
    c->cells_visible += totals[0];
    c->cells_attended += totals[1];
    c->verify_failures += totals[2];
    c->bytes_attended += totals[1] * row_bytes_;
    for (const auto & entry : indexes_) {
        if (entry.second != nullptr) {
            c->index_bytes += entry.second->bytes();
            c->kv_bytes += kv_bytes_.at(entry.first);
        }
    }
}

void Decoder::reset() {
    const int64_t zeros[4] = {};
    if (totals_.get() != nullptr) {
        api_->upload(stream_->device(), totals_.get(), zeros, sizeof(zeros));
    }
}

} // namespace fasa::gpu
