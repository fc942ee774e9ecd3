#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "../backend.h"

namespace fasa::gpu {

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
    now.uid            = seam::uid_of(graph);
    now.config         = s.config;
    now.layouts        = s.layouts;
    now.epoch          = epoch_;
    const bool arrived = head_start_.arrive();
    const auto goes_on = [&] { return is_captured_ && s.config.verify == 0 && same_as_last(now) && is_built(last_); };
    if (!arrived || !goes_on()) {
        undo();
    }
    if (goes_on()) {
        count(last_, s.counters);
        mark_written(last_);
        const bool begun = head_start_.is_under_way();
        head_start_.end();
        return (begun ? join() : launch()) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
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
    const bool  again  = same_as_last(now) && !verify && !now.waits;
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
    if (is_captured_ && built) {
        arm(graph, s.session);
    }
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

// ---- the next token before its inputs are complete --------------------------------------------------------------

void Decoder::arm(ggml_cgraph * graph, Session * session) {
    const Node & first = last_.work.front().args;
    for (const Work & w : last_.work) {
        if (w.args.n_rows * w.args.n_stream != 1 || w.args.n_kv != first.n_kv ||
            w.args.index.first_stream != first.index.first_stream || w.args.index.n_cell != first.index.n_cell) {
            return;
        }
    }
    const HeadStart::Cells cells = {first.index.first_stream * first.index.n_cell, first.n_kv, first.index.n_cell};
    if (last_.config.head_start == 0 || !head_start_.arm(graph, stream_, cells, first.scratch.totals)) {
        return;
    }
    for (const ggml_backend_buffer_t buffer : head_start_.buffers()) {
        if (!watch_buffer(buffer, session)) {
            head_start_.disarm();
            return;
        }
    }
}

void Decoder::token_is_set(const Embedding & embedding, const fasa_config & config, const Profile::Layouts * layouts) {
    undo(); // of a token whose graph never came
    if (!head_start_.foretell(embedding) || !is_captured_ || layouts != last_.layouts.get() ||
        std::memcmp(&config, &last_.config, sizeof(config)) != 0 || config.verify != 0 || epoch_ != last_.epoch ||
        !is_built(last_)) {
        return;
    }
    if (fork() && head_start_.begin()) {
        ++n_begun_;
        if (api_->launch(stream_->device(), capture_) != 0) {
            undo();
        }
    }
}

bool Decoder::has_input(const ggml_tensor * t, const void * data, size_t offset, size_t size) {
    HeadStart::Input input = head_start_.input(t, data, offset, size);
    if (input == HeadStart::Input::differs ||
        (input == HeadStart::Input::unknown && head_start_.is_under_way() && !ggml_backend_buffer_is_host(t->buffer))) {
        undo();
        input = head_start_.input(t, data, offset, size);
    }
    return input == HeadStart::Input::there;
}

void Decoder::graph_replaced() {
    undo();
    head_start_.disarm();
}

// The index has entries of a cell that holds something else again.
void Decoder::undo() {
    if (!head_start_.is_under_way()) {
        return;
    }
    ++n_undone_;
    const bool ok = head_start_.undo();
    for (const Work & w : last_.work) {
        int64_t & built = w.index->built(w.plan.first_stream);
        built           = ok ? std::min(built, head_start_.cell()) : 0;
    }
}

void Decoder::forget() {
    undo();
    head_start_.disarm();
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
    undo(); // while the indexes are there
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
    c->head_starts += n_begun_;
    c->head_starts_undone += n_undone_;
    for (const auto & entry : indexes_) {
        if (entry.second != nullptr) {
            c->index_bytes += entry.second->bytes();
            c->kv_bytes += kv_bytes_.at(entry.first);
        }
    }
}

void Decoder::reset() {
    const int64_t zeros[4] = {};
    n_begun_ = n_undone_ = 0;
    if (totals_.get() != nullptr) {
        api_->upload(stream_->device(), totals_.get(), zeros, sizeof(zeros));
    }
}

} // namespace fasa::gpu
