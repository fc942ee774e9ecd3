// What a session tells: counters, timings, captured queries and keys.
#include <algorithm>

#include "hadamard.h"
#include "session.h"
#include "status.h"

namespace fasa {

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
    for (const auto & gpu : gpus_) {
        gpu.second->add_to(&c);
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
    for (auto & gpu : gpus_) {
        gpu.second->reset();
    }
}

void Session::invalidate() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    refuse_while_running("The side index");
    for (auto & entry : layers_) {
        entry.second.index.reset();
    }
    for (auto & gpu : gpus_) {
        gpu.second->invalidate();
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

void Session::keys(int32_t layer, int64_t c0, int64_t c1, int32_t * head_dim, int32_t * n_head_kv, float * out) const {
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
        fail(FASA_STATUS_ARGUMENT, "K of layer %d has type %d; that type has no kernel, so its keys cannot be read.",
             layer, l.kv.k_type);
    }
    *head_dim  = l.kv.k_dim;
    *n_head_kv = l.n_head_kv;
    for (int64_t c = c0; out != nullptr && c < c1; ++c) {
        for (int32_t h = 0; h < l.n_head_kv; ++h) {
            float * key = out + ((c - c0) * l.n_head_kv + h) * l.kv.k_dim;
            kv_to_float(l.kv.k_type, static_cast<const char *>(l.kv.k) + c * l.kv.k_stride + h * l.head_bytes,
                        l.kv.k_dim, key);
            undo_rotation(key, l.kv.k_dim, l.rotation);
        }
    }
}

} // namespace fasa
