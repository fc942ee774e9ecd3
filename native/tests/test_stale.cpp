// K changes behind the attention node's back: the next step must see it. Each test compares the step with the same
// step on an index built anew, bit for bit, and lets the session verify every entry.
#include <cstring>
#include <numeric>

#include "decoder.h"
#include "half.h"

using namespace fasa_test;

namespace {

constexpr int64_t kPrompt = 180;

struct Setup {
    Shape     shape;
    AllChunks profile;
    Session   session;
    Backend   backend;
    Decoder   decoder;

    // A budget far below the visible cells: a stale index would select other cells.
    explicit Setup(const Shape & s)
        : shape(s), profile(s), session(new_session(&profile.view, config_of(12))), backend(decorated_backend(session)),
          decoder(s, backend) {}
};

Step attention_only(std::mt19937 & rng, const Shape & shape) {
    Step step = random_step(rng, shape, {}, kPrompt);
    step.mask.assign(shape.n_cell, 0); // all cells, so that none can hide a stale entry
    return step;
}

void prompt(Setup & s, std::mt19937 & rng) {
    std::vector<int64_t> cells(kPrompt);
    std::iota(cells.begin(), cells.end(), 0);
    s.decoder.run(random_step(rng, s.shape, cells, kPrompt));
    s.decoder.run(attention_only(rng, s.shape)); // indexes all blocks
}

// The next step, verified, and again on an index built anew. Returns cells that the step itself had to index.
int64_t check_next(Setup & s, std::mt19937 & rng) {
    const int64_t before = counters_of(s.session).cells_indexed;
    const Step    step   = attention_only(rng, s.shape);
    const auto    actual = s.decoder.run(step);
    const int64_t n      = counters_of(s.session).cells_indexed - before;
    CHECK_EQUAL(counters_of(s.session).verify_failures, 0);
    CHECK_EQUAL(fasa_session_invalidate(s.session.get()), FASA_STATUS_OK);
    CHECK(s.decoder.run(step) == actual);
    CHECK_EQUAL(counters_of(s.session).nodes[FASA_REASON_SPARSE], counters_of(s.session).graphs);
    return n;
}

std::vector<Shape> both_types() {
    Shape f16, q8;
    f16.head_dim = q8.head_dim = 96;
    q8.k_type                  = GGML_TYPE_Q8_0;
    return {f16, q8};
}

std::vector<uint8_t> random_rows(std::mt19937 & rng, const Shape & shape, int64_t n) {
    const int64_t        dim = static_cast<int64_t>(shape.head_dim) * shape.n_head_kv * n;
    const auto           x   = gaussian(rng, dim);
    std::vector<uint8_t> bytes(ggml_row_size(shape.k_type, dim));
    if (shape.k_type == GGML_TYPE_F16) {
        ggml_fp32_to_fp16_row(x.data(), reinterpret_cast<ggml_fp16_t *>(bytes.data()), dim);
    } else {
        ggml_quantize_chunk(shape.k_type, x.data(), bytes.data(), 0, 1, dim, nullptr);
    }
    return bytes;
}

} // namespace

TEST(an_unchanged_cache_is_not_indexed_again) {
    std::mt19937 rng = fresh_rng();
    Setup        s{Shape()};
    prompt(s, rng);
    CHECK_EQUAL(check_next(s, rng), 0);
}

TEST(set_rows_marks_its_cells_only) {
    std::mt19937 rng = fresh_rng();
    for (const Shape & shape : both_types()) {
        const Case c(shape.text());
        Setup      s(shape);
        prompt(s, rng);
        Step step = random_step(rng, shape, {3, 77, 200}, kPrompt); // overwritten ones, and a new one
        step.mask.assign(shape.n_cell, 0);
        const int64_t before = counters_of(s.session).cells_indexed;
        s.decoder.run(step);
        CHECK_EQUAL(counters_of(s.session).cells_indexed - before, 3);
        CHECK_EQUAL(check_next(s, rng), 0);
        CHECK_EQUAL(counters_of(s.session).stale_events, 0);
    }
}

TEST(tensor_set_into_the_cache) {
    std::mt19937 rng = fresh_rng();
    for (const Shape & shape : both_types()) {
        const Case c(shape.text());
        Setup      s(shape);
        prompt(s, rng);
        const auto   bytes = random_rows(rng, shape, 20);
        const size_t row   = s.decoder.k_cache()->nb[1];
        ggml_backend_tensor_set(s.decoder.k_cache(), bytes.data(), 50 * row, bytes.size());
        CHECK_EQUAL(check_next(s, rng), 20);
        // a part of one row
        ggml_backend_tensor_set(s.decoder.k_cache(), bytes.data(), 7 * row + 34, 68);
        CHECK_EQUAL(check_next(s, rng), 1);
        // through a view, as llama.cpp restores a state
        const ggml_init_params params = {1 << 16, nullptr, true};
        const Context          ctx(ggml_init(params));
        ggml_tensor *          view =
            ggml_view_2d(ctx.get(), s.decoder.k_cache(), s.decoder.k_cache()->ne[0], 5, row, 100 * row);
        CHECK_EQUAL(ggml_backend_view_init(view), GGML_STATUS_SUCCESS);
        ggml_backend_tensor_set(view, bytes.data(), 0, 5 * row);
        CHECK_EQUAL(check_next(s, rng), 5);
        CHECK(counters_of(s.session).stale_events >= 3);
    }
}

TEST(strided_set_memset_copy_and_clear) {
    std::mt19937  rng = fresh_rng();
    const Shape   shape;
    Setup         s(shape);
    ggml_tensor * k     = s.decoder.k_cache();
    const size_t  row   = k->nb[1];
    const auto    bytes = random_rows(rng, shape, shape.n_cell);
    prompt(s, rng);
    ggml_backend_tensor_set_2d(k, bytes.data(), 30 * row, 64, 10, row, row);
    check_next(s, rng);
    ggml_backend_tensor_memset(k, 0x11, 40 * row, 3 * row);
    CHECK_EQUAL(check_next(s, rng), 3);

    Decoder other(shape, s.backend);
    ggml_backend_tensor_set(other.k_cache(), bytes.data(), 0, bytes.size());
    ggml_backend_tensor_copy(other.k_cache(), k);
    CHECK_EQUAL(check_next(s, rng), shape.n_cell);

    ggml_backend_buffer_clear(k->buffer, 0);
    CHECK_EQUAL(check_next(s, rng), shape.n_cell);
}

TEST(a_write_into_v_leaves_the_index) {
    std::mt19937 rng = fresh_rng();
    Setup        s{Shape()};
    prompt(s, rng);
    const auto bytes = random_rows(rng, s.shape, 4);
    ggml_backend_tensor_set(s.decoder.v_cache(), bytes.data(), 0, bytes.size());
    CHECK_EQUAL(check_next(s, rng), 0);
}

// What llama.cpp does to shift positions: RoPE on the whole cache, in place or through a copy of a quantized one.
static std::vector<ggml_tensor *> k_shift(ggml_context * c, const Decoder & decoder) {
    const Shape & s     = decoder.shape();
    ggml_tensor * shift = ggml_new_tensor_1d(c, GGML_TYPE_I32, s.n_cell);
    ggml_set_name(shift, "shift");
    ggml_tensor * k = ggml_view_3d(c, decoder.k_cache(), s.head_dim, s.n_head_kv, s.n_cell,
                                   ggml_row_size(s.k_type, s.head_dim), decoder.k_cache()->nb[1], 0);
    if (!ggml_is_quantized(s.k_type)) {
        return {ggml_rope_ext_inplace(c, k, shift, nullptr, s.head_dim, 0, 4096, 1e4f, 1, 0, 1, 32, 1)};
    }
    ggml_tensor * x =
        ggml_rope_ext(c, ggml_cast(c, k, GGML_TYPE_F32), shift, nullptr, s.head_dim, 0, 4096, 1e4f, 1, 0, 1, 32, 1);
    return {ggml_cpy(c, x, k)};
}

TEST(k_shift_in_the_graph) {
    std::mt19937 rng = fresh_rng();
    for (const Shape & shape : both_types()) {
        for (const bool after : {false, true}) { // of the attention node
            const Case c(shape.text() + (after ? " after" : " before"));
            Setup      s(shape);
            prompt(s, rng);
            s.decoder.run(attention_only(rng, shape), after ? nullptr : Decoder::Extra(k_shift),
                          after ? Decoder::Extra(k_shift) : nullptr);
            CHECK_EQUAL(counters_of(s.session).verify_failures, 0);
            CHECK_EQUAL(counters_of(s.session).stale_events, 1);
            CHECK_EQUAL(check_next(s, rng), after ? shape.n_cell : 0);
        }
    }
}

TEST(copy_between_cells_in_the_graph) {
    std::mt19937 rng = fresh_rng();
    for (const Shape & shape : both_types()) {
        const Case c(shape.text());
        Setup      s(shape);
        prompt(s, rng);
        const auto copy = [](ggml_context * ctx, const Decoder & d) -> std::vector<ggml_tensor *> {
            ggml_tensor * k = d.k_cache();
            return {ggml_cpy(ctx, ggml_view_2d(ctx, k, k->ne[0], 30, k->nb[1], 0),
                             ggml_view_2d(ctx, k, k->ne[0], 30, k->nb[1], 100 * k->nb[1]))};
        };
        s.decoder.run(attention_only(rng, shape), copy);
        check_next(s, rng);
        s.decoder.run(attention_only(rng, shape), nullptr, copy);
        check_next(s, rng);
    }
}

TEST(set_rows_after_the_attention_node) {
    std::mt19937 rng = fresh_rng();
    Setup        s{Shape()};
    prompt(s, rng);
    const auto write = [](ggml_context * ctx, const Decoder & d) -> std::vector<ggml_tensor *> {
        // rows 0, 1, 2 of the cache, twice as long, into rows computed in the graph: numbers not known beforehand
        ggml_tensor * k    = d.k_cache();
        ggml_tensor * from = ggml_cast(ctx, ggml_view_2d(ctx, k, k->ne[0], 3, k->nb[1], 0), GGML_TYPE_F32);
        ggml_tensor * to   = ggml_cast(ctx, ggml_arange(ctx, 90, 93, 1), GGML_TYPE_I32);
        return {ggml_set_rows(ctx, k, ggml_scale(ctx, from, 2.0f), to)};
    };
    s.decoder.run(attention_only(rng, s.shape), nullptr, write);
    CHECK_EQUAL(check_next(s, rng), s.shape.n_cell); // unknown rows: all of them
}

TEST(set_rows_through_a_view_of_the_cache) {
    std::mt19937 rng = fresh_rng();
    Setup        s{Shape()};
    prompt(s, rng);
    const auto write = [](ggml_context * ctx, const Decoder & d) -> std::vector<ggml_tensor *> {
        ggml_tensor * k    = d.k_cache();
        ggml_tensor * part = ggml_view_2d(ctx, k, k->ne[0], 100, k->nb[1], 128 * k->nb[1]);
        ggml_tensor * from = ggml_cast(ctx, ggml_view_2d(ctx, k, k->ne[0], 1, k->nb[1], 0), GGML_TYPE_F32);
        ggml_tensor * to   = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1);
        ggml_set_name(to, "row");
        return {ggml_set_rows(ctx, part, ggml_scale(ctx, from, 2.0f), to)};
    };
    s.decoder.run(attention_only(rng, s.shape), write);
    check_next(s, rng);
}

TEST(graphs_whose_tensors_are_new_each_time_keep_their_index) {
    std::mt19937 rng = fresh_rng();
    for (const Shape & shape : both_types()) {
        const Case text(shape.text());
        Setup      s{shape};
        s.decoder.receive_graphs();
        prompt(s, rng);
        CHECK_EQUAL(check_next(s, rng), 0);
        s.decoder.run(random_step(rng, shape, {kPrompt, 3}, kPrompt + 1)); // indexed as they are written
        CHECK_EQUAL(check_next(s, rng), 0);
        const auto bytes = random_rows(rng, shape, 1); // as the command set_tensor of an rpc-client ends
        ggml_backend_tensor_set(s.decoder.k_cache(), bytes.data(), 5 * bytes.size(), bytes.size());
        CHECK_EQUAL(check_next(s, rng), 1);
    }
}
