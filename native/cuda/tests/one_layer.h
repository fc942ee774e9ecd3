// A decoder of one layer in device memory, of which nothing runs: what llama.cpp sets for a token, and what a run
// overwrites.
#pragma once

#include <ggml-cpp.h>

#include <cstring>
#include <utility>
#include <vector>

#include "../../gpu/head_start.h"
#include "stage.h"

namespace fasa_test {

using Bytes = std::vector<uint8_t>;
using fasa::gpu::Embedding;
using fasa::gpu::HeadStart;

constexpr int64_t kWidth = 64, kTokens = 50;

inline bool is_busy = false; // what the device says

inline std::shared_ptr<Stream> stream() {
    static const Api api = [] {
        Api own     = *cuda_api();
        own.is_idle = [](fasa::gpu::Device *) { return !is_busy; };
        return own;
    }();
    static const auto stream = std::make_shared<Stream>(&api, nullptr);
    return stream;
}

inline Bytes download(const void * from, size_t n) {
    Bytes out(n);
    CHECK_EQUAL(cuda_api()->download(stream()->device(), out.data(), from, n), 0);
    return out;
}

inline void upload(void * to, const void * from, size_t n) {
    CHECK_EQUAL(cuda_api()->upload(stream()->device(), to, from, n), 0);
}

template <typename T> Bytes bytes_of(const std::vector<T> & x) {
    Bytes out(x.size() * sizeof(T));
    std::memcpy(out.data(), x.data(), out.size());
    return out;
}

// What a token's inputs are, as llama.cpp sets them.
struct Inputs {
    int32_t               token = 0, pos = 0;
    int64_t               cell = 0, v_cell = 0; // through all streams; llama.cpp's are the same
    std::vector<uint16_t> mask;
    int32_t               out_id = 0;
};

// The graph of a one-layer decoder in device memory, and its caches. The other stream lies before the node's.
class Model {
  public:
    Model(std::mt19937 & rng, ggml_type type, ggml_type table_type, int64_t n_kv, bool second_stream)
        : n_kv_(n_kv), n_cell_(n_kv + 37), first_(second_stream ? n_cell_ : 0),
          ctx_(ggml_init({1 << 20, nullptr, true})), memory_(stream(), 1 << 20), totals_(stream(), 4),
          table_(gaussian(rng, kTokens * kWidth)) {
        scratch_.reset(ggml_backend_cpu_buffer_from_ptr(memory_.get(), 1 << 19));
        lasting_.reset(ggml_backend_cpu_buffer_from_ptr(memory_.get() + (1 << 19), 1 << 19));
        ggml_backend_buffer_set_usage(scratch_.get(), GGML_BACKEND_BUFFER_USAGE_COMPUTE);
        next_[0] = memory_.get(), next_[1] = memory_.get() + (1 << 19);
        ggml_context * c = ctx_.get();

        embd   = place(ggml_new_tensor_2d(c, GGML_TYPE_F32, kWidth, 1));
        pos    = place(ggml_new_tensor_1d(c, GGML_TYPE_I32, 1));
        k_idx  = place(ggml_new_tensor_1d(c, GGML_TYPE_I64, 1));
        v_idx  = place(ggml_new_tensor_1d(c, GGML_TYPE_I64, 1));
        mask   = place(ggml_new_tensor_4d(c, GGML_TYPE_F16, n_kv, 1, 1, 1));
        out_id = place(ggml_new_tensor_1d(c, GGML_TYPE_I32, 1));
        for (ggml_tensor *& cache : caches) {
            cache = place(ggml_new_tensor_2d(c, type, kWidth, n_cell_ * (second_stream ? 2 : 1)), true);
        }
        ggml_tensor * weight = place(ggml_new_tensor_1d(c, GGML_TYPE_F32, kWidth), true);
        ggml_tensor * x      = node(ggml_mul(c, embd, weight));
        ggml_tensor * q      = node(ggml_rope(c, ggml_reshape_3d(c, x, kWidth, 1, 1), pos, kWidth, 0));
        graph                = ggml_new_graph(c);
        ggml_build_forward_expand(graph, node(ggml_set_rows(c, caches[0], x, k_idx), caches[0]));
        ggml_build_forward_expand(graph, node(ggml_set_rows(c, caches[1], x, v_idx), caches[1]));
        const auto view = [&](ggml_tensor * cache) {
            ggml_tensor * v =
                ggml_view_3d(c, cache, kWidth, n_kv, 1, cache->nb[1], cache->nb[1] * n_cell_, cache->nb[1] * first_);
            v->buffer = cache->buffer, v->data = static_cast<uint8_t *>(cache->data) + v->view_offs;
            return v;
        };
        ggml_tensor * out = node(ggml_flash_attn_ext(c, q, view(caches[0]), view(caches[1]), mask, 1.0f, 0.0f, 0.0f));
        extra             = out;
        ggml_build_forward_expand(graph, node(ggml_get_rows(c, ggml_reshape_2d(c, out, kWidth, 1), out_id)));
        make_table(table_type);
        const Bytes noise = noise_of(rng, 1 << 19);
        upload(memory_.get() + (1 << 19), noise.data(), noise.size());
    }

    bool arm(HeadStart & head) { return head.arm(graph, stream(), {first_, n_kv_, n_cell_}, totals_.get()); }

    // A node that writes where the graph's memory is not.
    void add_copy() {
        ggml_tensor * copy = ggml_cpy(ctx_.get(), extra, ggml_view_1d(ctx_.get(), caches[0], kWidth, 0));
        copy->buffer       = caches[0]->buffer;
        ggml_build_forward_expand(graph, copy);
    }

    std::vector<std::pair<ggml_tensor *, Bytes>> list(const Inputs & in) {
        std::vector<std::pair<ggml_tensor *, Bytes>> all;
        all.emplace_back(embd, embedded(in.token));
        all.emplace_back(pos, bytes_of(std::vector<int32_t>{in.pos}));
        all.emplace_back(k_idx, bytes_of(std::vector<int64_t>{in.cell}));
        all.emplace_back(v_idx, bytes_of(std::vector<int64_t>{in.v_cell}));
        all.emplace_back(mask, bytes_of(in.mask));
        all.emplace_back(out_id, bytes_of(std::vector<int32_t>{in.out_id}));
        return all;
    }

    Embedding embedding(const int32_t * token) const {
        return {token, rows_.data(), kTokens, static_cast<int64_t>(ggml_row_size(type_, kWidth)), kWidth, type_, host};
    }

    // ggml's own GET_ROWS on the CPU.
    Bytes embedded(int32_t token) {
        ggml_context_ptr c(ggml_init({1 << 20, nullptr, false}));
        ggml_tensor *    table  = ggml_new_tensor_2d(c.get(), type_, kWidth, kTokens);
        ggml_tensor *    tokens = ggml_new_tensor_1d(c.get(), GGML_TYPE_I32, 1);
        std::memcpy(table->data, rows_.data(), rows_.size());
        std::memcpy(tokens->data, &token, sizeof(token));
        ggml_tensor * row = ggml_get_rows(c.get(), table, tokens);
        ggml_cgraph * g   = ggml_new_graph(c.get());
        ggml_build_forward_expand(g, row);
        ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        CHECK_EQUAL(ggml_backend_graph_compute(cpu.get(), g), GGML_STATUS_SUCCESS);
        Bytes out(kWidth * sizeof(float));
        std::memcpy(out.data(), row->data, out.size());
        return out;
    }

    Bytes lasting() const { return download(memory_.get() + (1 << 19), 1 << 19); }
    Bytes totals() const { return download(totals_.get(), 32); }

    // What a run leaves: other rows of the caches, other counters; inputs' memory is used for something else.
    void run(std::mt19937 & rng, int64_t cell) {
        for (ggml_tensor * cache : caches) {
            const Bytes row = noise_of(rng, cache->nb[1]);
            upload(static_cast<uint8_t *>(cache->data) + (first_ + cell) * cache->nb[1], row.data(), row.size());
        }
        const Bytes counted = noise_of(rng, 32), used = noise_of(rng, 1 << 19);
        upload(totals_.get(), counted.data(), counted.size());
        upload(memory_.get(), used.data(), used.size());
    }

    int64_t n_kv() const { return n_kv_; }
    int64_t first() const { return first_; }

    ggml_tensor * caches[2], *embd, *pos, *k_idx, *v_idx, *mask, *out_id, *extra;
    ggml_cgraph * graph;
    float         host[kWidth]; // where the CPU's GET_ROWS leaves the row

  private:
    static Bytes noise_of(std::mt19937 & rng, size_t n) {
        Bytes out(n);
        for (uint8_t & x : out) {
            x = static_cast<uint8_t>(rng());
        }
        return out;
    }

    ggml_tensor * place(ggml_tensor * t, bool lasts = false) {
        t->buffer = (lasts ? lasting_ : scratch_).get();
        t->data   = next_[lasts];
        next_[lasts] += (ggml_nbytes(t) + 63) / 64 * 64;
        return t;
    }

    ggml_tensor * node(ggml_tensor * t, ggml_tensor * into = nullptr) {
        if (into == nullptr) {
            return place(t);
        }
        t->buffer = into->buffer, t->data = into->data;
        return t;
    }

    void make_table(ggml_type type) {
        type_ = type;
        rows_.resize(ggml_row_size(type, kWidth) * kTokens);
        if (type == GGML_TYPE_F32) {
            std::memcpy(rows_.data(), table_.data(), rows_.size());
        } else {
            ggml_quantize_chunk(type, table_.data(), rows_.data(), 0, kTokens, kWidth, nullptr);
        }
    }

    int64_t                 n_kv_, n_cell_, first_;
    ggml_context_ptr        ctx_;
    Memory<uint8_t>         memory_;
    Memory<int64_t>         totals_;
    std::vector<float>      table_;
    ggml_type               type_ = GGML_TYPE_F32;
    Bytes                   rows_;
    ggml_backend_buffer_ptr scratch_, lasting_;
    uint8_t *               next_[2];
};

inline Inputs first_inputs(std::mt19937 & rng, const Model & model, int64_t cell) {
    Inputs in;
    in.token = static_cast<int32_t>(rng() % kTokens);
    in.pos   = static_cast<int32_t>(rng() % 1000);
    in.cell = in.v_cell = model.first() + cell;
    in.mask.assign(model.n_kv(), 0xfc00);
    for (int64_t c = 0; c <= cell; ++c) {
        in.mask[c] = rng() % 8 != 0 || c == cell ? 0 : 0xfc00;
    }
    return in;
}

inline void next(std::mt19937 & rng, const Model & model, Inputs & in) {
    in.token = static_cast<int32_t>(rng() % kTokens);
    ++in.pos;
    ++in.cell, ++in.v_cell;
    in.mask[in.cell - model.first()] = 0;
}

} // namespace fasa_test
