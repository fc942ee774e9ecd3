#include "session.h"

#include <algorithm>
#include <cstring>

#include "backend.h"
#include "clock.h"
#include "gpu/library.h"
#include "status.h"

namespace fasa {

static_assert(sizeof(fasa_counters::nodes) / sizeof(int64_t) == FASA_REASON_COUNT, "a counter per reason");

void check_config(const fasa_config & c) {
    if (c.budget < 1) {
        fail(FASA_STATUS_ARGUMENT, "budget is %d; it must be at least 1 cell.", c.budget);
    }
    if (c.n_fc < 0 || c.n_fc > FASA_MAX_HEAD_DIM / 2) {
        fail(FASA_STATUS_ARGUMENT, "n_fc is %d; 1 to %d chunks, or 0 for all that the profile ranks.", c.n_fc,
             FASA_MAX_HEAD_DIM / 2);
    }
    if (c.bits != 0 && !width_exists(c.bits)) {
        fail(FASA_STATUS_ARGUMENT, "index_bits is %d; 1, 2, 4 or 8 bits exist.", c.bits);
    }
    if (c.n_threads < 0) {
        fail(FASA_STATUS_ARGUMENT, "n_threads is %d; it must be 0 for all threads, or how many.", c.n_threads);
    }
    if (c.max_rows < 0 || c.max_rows > FASA_MAX_ROWS) {
        fail(FASA_STATUS_ARGUMENT, "max_rows is %d; it must be from 0 to %d query rows.", c.max_rows, FASA_MAX_ROWS);
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

    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    refuse_while_running("The profile");
    auto layouts = fresh != nullptr ? fresh->layouts(config_.n_fc, config_.bits) : nullptr;
    profile_     = std::move(fresh);
    layouts_     = std::move(layouts);
    ++generation_;
}

void Session::configure(const fasa_config & config) {
    check_config(config);
    const Kernels & kernels = kernels_of(config.isa);

    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    refuse_while_running("The configuration");
    if (profile_ != nullptr && (config.n_fc != config_.n_fc || config.bits != config_.bits)) {
        layouts_ = profile_->layouts(config.n_fc, config.bits);
    }
    config_  = config;
    kernels_ = &kernels;
    ++generation_;
}

void Session::check_model(const fasa_model & model, std::function<void(const std::string &)> tell) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    model_ = model;
    tell_  = std::move(tell);
}

void Session::set_scorer(fasa_scorer scorer, void * user) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    refuse_while_running("The scorer");
    if (scorer != nullptr && !gpus_.empty()) {
        fail(FASA_STATUS_STATE, "Scores from outside need K and V in system memory; pass offload_kqv=False.");
    }
    scorer_      = scorer;
    scorer_user_ = user;
}

// ---- around a graph ------------------------------------------------------------------------------------

ggml_status Session::compute(ggml_backend_t backend, ggml_cgraph * graph, GraphCompute inner) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const int64_t                               start = now_ns();
    if (gpu::is_cuda(ggml_backend_get_device(backend))) {
        return compute_on_gpu(backend, graph, inner);
    }
    note_embedding(graph);
    try {
        scan(graph);
        reserve_scratch();
        find_idle_casts(graph);
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
        idle_casts_.clear();
    }
    replace();
    const int64_t planned    = now_ns();
    running_                 = true;
    const ggml_status status = inner(backend, graph);
    running_                 = false;
    restore();
    for (auto & gpu : gpus_) {
        if (status != GGML_STATUS_SUCCESS) {
            gpu.second->undo(); // the token's graph will not come
        }
    }

    for (const NodeWork & w : work_) {
        if (w.index != nullptr && status == GGML_STATUS_SUCCESS) {
            for (size_t i = 0; i < w.plan.n_block.size(); ++i) {
                w.index->clear_marks(w.plan.first_stream + static_cast<int64_t>(i), w.plan.n_block[i]);
            }
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
    late_.clear();
    return status;
}

// Where a single GPU does all but the first step of a token, the token tells what its graph will be given.
void Session::note_embedding(ggml_cgraph * graph) {
    if (gpus_.size() != 1 || config_.head_start == 0) {
        embedding_ = {};
        return;
    }
    ggml_backend_buffer_t buffer = nullptr;
    embedding_                   = gpu::embedding_of(graph, &buffer);
    if (buffer != nullptr && !watch_buffer(buffer, this)) {
        embedding_ = {};
    }
}

bool Session::has_input(const ggml_tensor * t, const void * data, size_t offset, size_t size) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    return std::any_of(gpus_.begin(), gpus_.end(),
                       [&](const auto & gpu) { return gpu.second->has_input(t, data, offset, size); });
}

void Session::buffer_reset() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    embedding_ = {};
    for (auto & gpu : gpus_) {
        gpu.second->graph_replaced();
    }
}

ggml_status Session::compute_on_gpu(ggml_backend_t backend, ggml_cgraph * graph, GraphCompute inner) {
    auto & decoder = gpus_[backend];
    if (decoder == nullptr) {
        decoder = std::make_unique<gpu::Decoder>(gpu::api(), backend);
    }
    running_                 = true;
    const ggml_status status = decoder->compute(
        graph, inner, {this, profile_.get(), layouts_, config_, generation_, &counters_, several_masks()});
    running_ = false;
    ++counters_.graphs;
    return status;
}

bool Session::several_masks() const {
    return windows_.several_masks() ||
           std::any_of(gpus_.begin(), gpus_.end(), [](const auto & gpu) { return gpu.second->several_masks(); });
}

void Session::reserve_scratch() {
    int64_t n_head  = 0;
    int64_t n_block = 0;
    for (const NodeWork & w : work_) {
        n_head  = std::max<int64_t>(n_head, w.plan.n_head);
        n_block = std::max(n_block, (w.plan.k->ne[1] + FASA_BLOCK_CELLS - 1) / FASA_BLOCK_CELLS);
    }
    if (n_head > 0) {
        scratch_.reserve(n_head, n_block);
    }
}

void Session::complete_work() {
    saved_.reserve(3 * work_.size()); // replace() must not run out of memory half way
    for (size_t i = 0; i < work_.size(); ++i) {
        NodeWork & w          = work_[i];
        w.kernels             = kernels_;
        w.config              = &config_;
        w.scratch             = &scratch_;
        w.barrier             = &barrier_;
        w.timings             = &timings_;
        w.n_attended          = &n_attended_;
        w.bytes_attended      = &bytes_attended_;
        w.n_indexed           = &n_indexed_;
        w.n_verify_failures   = &n_verify_failures_;
        w.scorer              = scorer_;
        w.scorer_user         = scorer_user_;
        const ggml_tensor * q = w.node->src[0];
        if (w.index == nullptr) {
            Captured &   c   = captured_[w.plan.layer];
            const size_t old = c.rows.size();
            c.head_dim       = static_cast<int32_t>(q->ne[0]);
            c.n_head         = w.plan.n_head;
            c.rows.resize(old + q->ne[0] * q->ne[1] * q->ne[2]);
            w.captured = c.rows.data() + old;
        } else {
            for (const Row & row : w.plan.rows) {
                counters_.cells_visible += row.visible->n_cell * w.plan.n_head;
                counters_.bytes_scored +=
                    row.attend_all || scorer_ != nullptr ? 0 : row.visible->n_block * w.index->block_bytes();
            }
            for (const int64_t n_block : w.plan.n_block) {
                counters_.cells_verified += config_.verify != 0 ? n_block * FASA_BLOCK_CELLS : 0;
            }
        }
    }
}

void Session::replace() {
    for (NodeWork & w : work_) {
        const seam::CustomOp op = {run_node, GGML_N_TASKS_MAX, &w};
        static_assert(sizeof(op) <= sizeof(Saved::op_params), "op_params must hold a custom op");
        save(w.node);
        w.node->op = GGML_OP_CUSTOM;
        std::memcpy(w.node->op_params, &op, sizeof(op));
    }
    for (ggml_tensor * cast : idle_casts_) { // nobody reads their results now
        save(cast);
        cast->op = GGML_OP_NONE;
    }
}

void Session::save(ggml_tensor * node) {
    saved_.push_back({node, node->op, {}});
    std::memcpy(saved_.back().op_params, node->op_params, sizeof(node->op_params));
}

void Session::restore() {
    for (const Saved & saved : saved_) {
        saved.node->op = saved.op;
        std::memcpy(saved.node->op_params, saved.op_params, sizeof(saved.op_params));
    }
    saved_.clear();
}

// ---- what the decorated buffer reports -----------------------------------------------------------------

void Session::bytes_written(const void * first, size_t size) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (first == embedding_.tokens && size == sizeof(int32_t)) {
        for (auto & gpu : gpus_) {
            gpu.second->token_is_set(embedding_, config_, layouts_.get());
        }
        return;
    }
    for (auto & entry : layers_) {
        if (entry.second.index != nullptr) {
            counters_.stale_events += entry.second.index->mark_bytes(first, size) ? 1 : 0;
        }
    }
    for (auto & order : orders_) {
        order.second.bytes_written(first, size);
    }
    for (auto & gpu : gpus_) {
        counters_.stale_events += gpu.second->bytes_written(first, size) ? 1 : 0;
    }
}

bool Session::wants(const ggml_tensor * node) const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    // Not whether FASA is enabled just now: llama.cpp keeps a graph, and what it once decided, for as long as it can.
    const bool sparse = profile_ != nullptr && node->src[0]->ne[1] <= config_.max_rows &&
                        node->src[1]->ne[1] >= std::max(config_.min_ctx, 1);
    return sparse || config_.capture != 0;
}

void Session::backend_freed(ggml_backend_t backend) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    gpus_.erase(backend);
}

void Session::buffer_freed(ggml_backend_buffer_t buffer) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    embedding_ = {};
    orders_.erase(buffer);
    foreign_.erase(buffer);
    for (auto it = layers_.begin(); it != layers_.end();) {
        it = it->second.buffer == buffer ? layers_.erase(it) : std::next(it);
    }
    windows_ = layers_.empty() ? SlidingWindows() : windows_; // an rpc-server may get another model now
    for (auto & gpu : gpus_) {
        gpu.second->buffer_freed(buffer);
    }
}

} // namespace fasa
