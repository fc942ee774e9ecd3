#include "decoder.h"

#include <ggml-alloc.h>

#include <algorithm>
#include <cmath>

#include "half.h"

namespace fasa_test {

namespace {

using fasa::kHalfMinusInf;

Context new_context() {
    const ggml_init_params params = {4 << 20, nullptr, true};
    return Context(ggml_init(params));
}

template <typename T> void set(ggml_tensor * t, const std::vector<T> & x) {
    CHECK_EQUAL(x.size() * sizeof(T), ggml_nbytes(t));
    ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
}

} // namespace

Backend new_backend() {
    Backend backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    CHECK(backend != nullptr);
    set_threads(backend, 1);
    return backend;
}

void set_threads(const Backend & backend, int n) {
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    const auto               set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
    CHECK(set != nullptr);
    set(backend.get(), n);
}

float Shape::scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

std::string Shape::text() const {
    return "head_dim " + std::to_string(head_dim) + " n_head " + std::to_string(n_head) + "/" +
           std::to_string(n_head_kv) + " k " + ggml_type_name(k_type) + " v " + ggml_type_name(v_type) + " softcap " +
           std::to_string(softcap) + (sinks ? " sinks" : "");
}

AllChunks::AllChunks(const Shape & shape, uint8_t width, int32_t n_layer) {
    const int32_t n_ranked = shape.head_dim / 2;
    for (int32_t i = 0; i < n_layer * shape.n_head_kv * n_ranked; ++i) {
        chunks.push_back(static_cast<uint16_t>(i % n_ranked));
    }
    bits.assign(chunks.size(), width);
    view = {n_layer,  shape.n_head_kv, shape.head_dim, shape.head_dim, FASA_ROPE_NORM,
            n_ranked, chunks.data(),   bits.data(),    nullptr,        nullptr};
}

fasa_config config_of(int32_t budget) {
    fasa_config config = {};
    config.enabled     = 1;
    config.budget      = budget;
    config.max_rows    = 8;
    config.verify      = 1;
    config.isa         = FASA_ISA_AUTO;
    return config;
}

Session new_session(const fasa_profile * profile, const fasa_config & config) {
    fasa_session * session = nullptr;
    CHECK_EQUAL(fasa_session_create(profile, &config, &session), FASA_STATUS_OK);
    return Session(session);
}

Backend decorated_backend(const Session & session) {
    CHECK_EQUAL(fasa_session_arm(session.get()), FASA_STATUS_OK);
    Backend backend = new_backend();
    CHECK_EQUAL(fasa_session_disarm(session.get()), FASA_STATUS_OK);
    return backend;
}

fasa_counters counters_of(const Session & session) {
    fasa_counters c;
    CHECK_EQUAL(fasa_session_counters(session.get(), &c), FASA_STATUS_OK);
    return c;
}

Step random_step(std::mt19937 & rng, const Shape & shape, std::vector<int64_t> cells, int64_t n_seen) {
    return random_rows(rng, shape, std::move(cells), std::vector<std::vector<int64_t>>(shape.n_stream, {n_seen}));
}

Step random_rows(std::mt19937 & rng, const Shape & shape, std::vector<int64_t> cells,
                 const std::vector<std::vector<int64_t>> & n_seen) {
    Step step;
    step.n_rows = static_cast<int64_t>(n_seen.at(0).size());
    step.k      = gaussian(rng, shape.head_dim * shape.n_head_kv * cells.size());
    step.v      = gaussian(rng, shape.head_dim * shape.n_head_kv * cells.size());
    step.q      = gaussian(rng, shape.head_dim * shape.n_head * step.n_rows * shape.n_stream, 2.0f);
    step.sinks  = gaussian(rng, shape.n_head, 3.0f); // large enough for a lost sink to show
    step.cells  = std::move(cells);
    step.mask.assign(shape.n_cell * step.n_rows * shape.n_stream, kHalfMinusInf);
    auto mask = step.mask.begin();
    for (const auto & stream : n_seen) {
        for (const int64_t n : stream) {
            for (int64_t c = 0; c < n; ++c) {
                mask[c] = c > 0 && rng() % 16 == 0 ? kHalfMinusInf : 0;
            }
            mask += shape.n_cell;
        }
    }
    return step;
}

Decoder::Decoder(const Shape & shape, const Backend & backend)
    : shape_(shape), backend_(backend.get()), ctx_(new_context()) {
    const int64_t row = static_cast<int64_t>(shape.head_dim) * shape.n_head_kv;
    k_                = ggml_new_tensor_3d(ctx_.get(), shape.k_type, row, shape.n_cell, shape.n_stream);
    v_                = ggml_new_tensor_3d(ctx_.get(), shape.v_type, row, shape.n_cell, shape.n_stream);
    ggml_set_name(k_, "cache_k_l0");
    ggml_set_name(v_, "cache_v_l0");
    buffer_.reset(ggml_backend_alloc_ctx_tensors(ctx_.get(), backend_));
    CHECK(buffer_ != nullptr);
    ggml_backend_buffer_clear(buffer_.get(), 0);
}

ggml_tensor * Decoder::view(ggml_context * ctx, ggml_tensor * cache, int64_t n_kv) const {
    ggml_tensor * cells = ggml_view_4d(ctx, cache, shape_.head_dim, shape_.n_head_kv, n_kv, shape_.n_stream,
                                       ggml_row_size(cache->type, shape_.head_dim), cache->nb[1], cache->nb[2], 0);
    ggml_tensor * heads = ggml_permute(ctx, cells, 0, 2, 1, 3);
    return cache->type == GGML_TYPE_F32 ? ggml_cast(ctx, heads, GGML_TYPE_F16) : heads; // as llama.cpp does
}

ggml_tensor * Decoder::root(ggml_context * ctx, ggml_tensor * cache) const {
    if (!received_) {
        return cache;
    }
    ggml_tensor * copy = ggml_dup_tensor(ctx, cache);
    copy->data         = cache->data;
    copy->buffer       = cache->buffer;
    ggml_set_name(copy, cache->name);
    return copy;
}

std::vector<float> Decoder::run(const Step & step, const Extra & before, const Extra & after) {
    const Context  ctx   = new_context();
    ggml_context * c     = ctx.get();
    const int64_t  row   = static_cast<int64_t>(shape_.head_dim) * shape_.n_head_kv;
    const int64_t  n_new = static_cast<int64_t>(step.cells.size());
    const int64_t  n_str = shape_.n_stream;
    const int64_t  n_kv  = static_cast<int64_t>(step.mask.size()) / step.n_rows / n_str;

    ggml_tensor * q      = ggml_new_tensor_4d(c, GGML_TYPE_F32, shape_.head_dim, step.n_rows, shape_.n_head, n_str);
    ggml_tensor * mask   = ggml_new_tensor_4d(c, GGML_TYPE_F16, n_kv, step.n_rows, 1, n_str);
    ggml_tensor * sinks  = ggml_new_tensor_1d(c, GGML_TYPE_F32, shape_.n_head);
    ggml_tensor * k      = ggml_new_tensor_2d(c, GGML_TYPE_F32, row, std::max<int64_t>(1, n_new));
    ggml_tensor * v      = ggml_new_tensor_2d(c, GGML_TYPE_F32, row, std::max<int64_t>(1, n_new));
    ggml_tensor * cells  = ggml_new_tensor_1d(c, GGML_TYPE_I64, std::max<int64_t>(1, n_new));
    ggml_tensor * k_root = root(c, k_);
    ggml_tensor * v_root = root(c, v_);
    ggml_cgraph * graph  = ggml_new_graph(c);
    const auto    expand = [&](const Extra & extra) {
        for (ggml_tensor * t : extra != nullptr ? extra(c, *this) : std::vector<ggml_tensor *>()) {
            ggml_build_forward_expand(graph, t);
        }
    };
    if (n_new > 0) {
        for (const auto & [cache, rows] : {std::pair{k_root, k}, std::pair{v_root, v}}) {
            ggml_tensor * all = ggml_reshape_2d(c, cache, row, shape_.n_cell * n_str);
            ggml_build_forward_expand(graph, ggml_set_rows(c, all, rows, cells));
        }
    }
    expand(before);
    ggml_tensor * out = ggml_flash_attn_ext(c, q, view(c, k_root, n_kv), view(c, v_root, n_kv), mask, shape_.scale(),
                                            0.0f, shape_.softcap);
    if (shape_.sinks) {
        ggml_flash_attn_ext_add_sinks(out, sinks);
    }
    ggml_build_forward_expand(graph, out);
    expand(after);

    const Buffer buffer(ggml_backend_alloc_ctx_tensors(c, backend_));
    CHECK(buffer != nullptr);
    ggml_backend_buffer_clear(buffer.get(), 0xaa); // poison: what is not computed shows
    set(q, step.q);
    set(mask, step.mask);
    set(sinks, step.sinks);
    if (n_new > 0) {
        set(k, step.k);
        set(v, step.v);
        set(cells, step.cells);
    }
    // Inputs of extra nodes, by name: every cell moves on by 7 positions; row 5 of a view is written.
    for (ggml_tensor * t = ggml_get_first_tensor(c); t != nullptr; t = ggml_get_next_tensor(c, t)) {
        if (std::string(t->name) == "shift") {
            set(t, std::vector<int32_t>(t->ne[0], 7));
        } else if (std::string(t->name) == "row") {
            set(t, std::vector<int64_t>{5});
        }
    }
    CHECK_EQUAL(ggml_backend_graph_compute(backend_, graph), GGML_STATUS_SUCCESS);
    CHECK_EQUAL(out->op, GGML_OP_FLASH_ATTN_EXT); // the graph is given back as it came
    for (ggml_tensor * t = ggml_get_first_tensor(c); t != nullptr; t = ggml_get_next_tensor(c, t)) {
        if (t->name[0] != '\0' && t->type == GGML_TYPE_F32 && t->op != GGML_OP_NONE && ggml_is_contiguous(t)) {
            std::vector<float> & values = named_[t->name];
            values.resize(ggml_nelements(t));
            ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
        }
    }
    std::vector<float> result(ggml_nelements(out));
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    return result;
}

} // namespace fasa_test
