// Whole graphs on a decorated CPU backend, against the same graphs on a plain one and against the stages by hand.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "decoder.h"
#include "kernels.h"

using namespace fasa_test;

namespace {

constexpr double kMaxNmse        = 5e-4;  // what llama.cpp allows between its own backends for flash attention
constexpr double kMaxThreadsNmse = 1e-10; // sums of float32 in another order

std::vector<int64_t> range(int64_t first, int64_t last) {
    std::vector<int64_t> cells(last - first);
    std::iota(cells.begin(), cells.end(), first);
    return cells;
}

// A prompt of 150 cells in one graph, then one cell per step.
std::vector<Step> conversation(std::mt19937 & rng, const Shape & shape, int n_steps) {
    std::vector<Step> steps = {random_step(rng, shape, range(0, 150), 150)};
    for (int i = 0; i < n_steps; ++i) {
        steps.push_back(random_step(rng, shape, {150 + i}, 151 + i));
    }
    return steps;
}

// The node's answer from the stages of the C interface: index, score, force, select, attend, sink.
std::vector<float> by_hand(const Decoder & decoder, const Step & step, const fasa_profile & profile,
                           const fasa_config & config) {
    const Shape & s       = decoder.shape();
    const int64_t n_block = s.n_cell / 64;
    const int64_t k_head  = static_cast<int64_t>(ggml_row_size(s.k_type, s.head_dim));
    const int64_t v_head  = static_cast<int64_t>(ggml_row_size(s.v_type, s.head_dim));
    const auto *  k       = static_cast<const uint8_t *>(decoder.k_cache()->data);
    const auto *  v       = static_cast<const uint8_t *>(decoder.v_cache()->data);

    std::vector<int32_t>  seen;
    std::vector<uint64_t> visible(n_block, 0);
    for (int32_t c = 0; c < s.n_cell; ++c) {
        if (step.mask[c] != 0xfc00) {
            seen.push_back(c);
            visible[c / 64] |= uint64_t{1} << (c % 64);
        }
    }
    std::vector<float> result;
    for (int32_t h = 0; h < s.n_head; ++h) {
        const int32_t kv_head = h / (s.n_head / s.n_head_kv);
        const float * q       = step.q.data() + h * s.head_dim;
        fasa_layout * layout  = nullptr;
        CHECK_EQUAL(fasa_layout_create(s.head_dim, profile.n_rot, profile.rope, profile.n_ranked, profile.chunks,
                                       profile.bits, nullptr, nullptr, &layout),
                    0);
        std::vector<uint8_t> index(n_block * fasa_layout_block_bytes(layout));
        std::vector<float>   key(s.head_dim);
        for (int64_t c = 0; c < s.n_cell; ++c) {
            fasa::kv_to_float(s.k_type, k + c * decoder.k_cache()->nb[1] + kv_head * k_head, s.head_dim, key.data());
            CHECK_EQUAL(fasa_index_write(layout, key.data(), &c, 1, index.data()), 0);
        }
        std::vector<float>   scores(s.n_cell), peaks(8 * n_block), scratch(s.n_cell);
        std::vector<int32_t> cells(s.n_cell);
        int64_t              n = 0;
        CHECK_EQUAL(fasa_score(FASA_ISA_AUTO, layout, q, 1, index.data(), visible.data(), n_block, 0, n_block,
                               scores.data(), peaks.data()),
                    0);
        fasa_layout_free(layout);
        for (int32_t i = 0; i < static_cast<int32_t>(seen.size()); ++i) {
            if (i < config.sinks || i >= static_cast<int32_t>(seen.size()) - config.recent) {
                scores[seen[i]]                            = std::numeric_limits<float>::max();
                peaks[seen[i] / 64 * 8 + seen[i] % 64 % 8] = std::numeric_limits<float>::max();
            }
        }
        CHECK_EQUAL(fasa_select(FASA_ISA_AUTO, scores.data(), peaks.data(), n_block, config.budget, scratch.data(),
                                cells.data(), &n),
                    0);
        CHECK_EQUAL(n, std::min<int64_t>(config.budget, seen.size()));
        const fasa_kv      kv = {k + kv_head * k_head,
                                 v + kv_head * v_head,
                                 static_cast<int64_t>(decoder.k_cache()->nb[1]),
                                 static_cast<int64_t>(decoder.v_cache()->nb[1]),
                                 s.k_type,
                                 s.v_type,
                                 s.head_dim,
                                 s.head_dim,
                                 s.scale(),
                                 s.softcap,
                                 step.mask.data()};
        std::vector<float> o(s.head_dim, 0.0f);
        float              m = -std::numeric_limits<float>::infinity(), d = 0.0f;
        CHECK_EQUAL(fasa_attend(FASA_ISA_REFERENCE, &kv, q, cells.data(), n, &m, &d, o.data()), 0);
        d += s.sinks ? std::exp(step.sinks[h] - m) : 0.0f;
        for (const float x : o) {
            result.push_back(x / d);
        }
    }
    return result;
}

std::vector<Shape> shapes() {
    std::vector<Shape> all;
    for (const ggml_type k : {GGML_TYPE_F16, GGML_TYPE_Q8_0}) {
        for (const ggml_type v : {GGML_TYPE_F16, GGML_TYPE_Q8_0}) {
            for (const auto & heads : {std::pair<int, int>{2, 2}, {6, 2}, {4, 1}}) {
                Shape s;
                // 96: a multiple of 32, not of 64, so that a quantized K is not taken for a rotated one
                s.head_dim  = 96;
                s.k_type    = k;
                s.v_type    = v;
                s.n_head    = heads.first;
                s.n_head_kv = heads.second;
                all.push_back(s);
            }
        }
    }
    for (const float softcap : {0.0f, 8.0f}) {
        for (const bool sinks : {false, true}) {
            Shape s;
            s.softcap = softcap;
            s.sinks   = sinks;
            all.push_back(s);
        }
    }
    return all;
}

} // namespace

TEST(budget_above_visible_equals_dense) {
    std::mt19937 rng = fresh_rng();
    for (const Shape & shape : shapes()) {
        const Case      c(shape.text());
        const AllChunks profile(shape);
        const Session   session   = new_session(&profile.view, config_of(512));
        const Backend   plain     = new_backend();
        const Backend   decorated = decorated_backend(session);
        Decoder         dense(shape, plain);
        Decoder         sparse(shape, decorated);
        for (const Step & step : conversation(rng, shape, 4)) {
            const auto expected = dense.run(step);
            CHECK_AT_MOST(nmse(sparse.run(step), expected), kMaxNmse);
        }
        const fasa_counters n = counters_of(session);
        CHECK_EQUAL(n.graphs, 5);
        CHECK_EQUAL(n.nodes[FASA_REASON_SPARSE], 5);
        CHECK_EQUAL(n.verify_failures, 0);
        CHECK_EQUAL(n.cells_attended, n.cells_visible);
        CHECK_EQUAL(n.stale_events, 0);
    }
}

TEST(a_small_budget_is_the_stages_in_order) {
    std::mt19937 rng = fresh_rng();
    for (const Shape & shape : shapes()) {
        if (shape.k_type == GGML_TYPE_Q8_0 && shape.head_dim % 64 == 0) {
            continue; // by_hand does not undo a rotation
        }
        const Case      c(shape.text());
        const AllChunks profile(shape, 8);
        fasa_config     config = config_of(40);
        config.sinks           = 4;
        config.recent          = 9;
        const Session session  = new_session(&profile.view, config);
        const Backend backend  = decorated_backend(session);
        Decoder       decoder(shape, backend);
        for (const Step & step : conversation(rng, shape, 3)) {
            const auto actual = decoder.run(step);
            CHECK_AT_MOST(nmse(actual, by_hand(decoder, step, profile.view, config)), 1e-9);
        }
        const fasa_counters n = counters_of(session);
        CHECK_EQUAL(n.cells_attended, 40 * 4 * shape.n_head);
        CHECK_EQUAL(n.verify_failures, 0);
    }
}

TEST(threads_do_not_change_the_result) {
    std::mt19937 rng = fresh_rng();
    for (const auto & heads : {std::pair<int, int>{1, 1}, {2, 1}, {3, 1}, {3, 3}, {4, 2}, {8, 2}}) {
        Shape shape;
        shape.n_head             = heads.first;
        shape.n_head_kv          = heads.second;
        shape.sinks              = heads.first == 3;
        const auto         steps = conversation(rng, shape, 2);
        std::vector<float> one;
        for (const int n_threads : {1, 2, 3, 4}) { // up to four threads for one head: its selection is split
            const Case      c(shape.text() + " threads " + std::to_string(n_threads));
            const AllChunks profile(shape);
            fasa_config     config = config_of(70);
            config.sinks           = 2;
            config.recent          = 3;
            const Session session  = new_session(&profile.view, config);
            const Backend backend  = decorated_backend(session);
            set_threads(backend, n_threads);
            Decoder            decoder(shape, backend);
            std::vector<float> last;
            for (const Step & step : steps) {
                last = decoder.run(step);
            }
            one = n_threads == 1 ? last : one;
            CHECK_AT_MOST(nmse(last, one), kMaxThreadsNmse);
            const fasa_counters n = counters_of(session);
            CHECK_EQUAL(n.cells_attended, 70 * 3 * shape.n_head);
            CHECK_EQUAL(n.cells_indexed, 194); // three blocks at first, then the two new cells
            CHECK_EQUAL(n.verify_failures, 0);
        }
    }
}

TEST(a_budget_below_the_number_of_splits) {
    std::mt19937 rng = fresh_rng();
    Shape        shape;
    shape.n_head = shape.n_head_kv = 1;
    const Step step                = random_step(rng, shape, range(0, 150), 150);
    for (const int32_t budget : {1, 2, 7}) { // eight splits of one head: some are empty
        const AllChunks profile(shape);
        const Session   session = new_session(&profile.view, config_of(budget));
        const Backend   backend = decorated_backend(session);
        set_threads(backend, 4);
        Decoder    decoder(shape, backend);
        const auto actual = decoder.run(step); // before by_hand, which reads the cache
        CHECK_AT_MOST(nmse(actual, by_hand(decoder, step, profile.view, config_of(budget))), 1e-9);
    }
}

TEST(fewer_visible_cells_than_min_ctx_stay_dense) {
    std::mt19937    rng = fresh_rng();
    const Shape     shape;
    const AllChunks profile(shape);
    fasa_config     config = config_of(8);
    config.min_ctx         = 10000;
    const Session session  = new_session(&profile.view, config);
    const Backend plain = new_backend(), decorated = decorated_backend(session);
    Decoder       dense(shape, plain), sparse(shape, decorated);
    for (const Step & step : conversation(rng, shape, 2)) {
        const auto expected = dense.run(step);
        CHECK(sparse.run(step) == expected);
    }
    CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SHORT_CONTEXT], 3);
    config.min_ctx = 0; // the index catches up with what was written while dense
    CHECK_EQUAL(fasa_session_configure(session.get(), &config), FASA_STATUS_OK);
    const Step last   = random_step(rng, shape, {200}, 201);
    const auto actual = sparse.run(last);
    CHECK_AT_MOST(nmse(actual, by_hand(sparse, last, profile.view, config)), 1e-9);
    CHECK_EQUAL(counters_of(session).verify_failures, 0);
}

TEST(capture_computes_exact_attention_and_keeps_queries) {
    std::mt19937 rng = fresh_rng();
    Shape        shape;
    shape.sinks           = true;
    fasa_config config    = config_of(1);
    config.capture        = 1;
    const Session session = new_session(nullptr, config);
    const Backend plain = new_backend(), decorated = decorated_backend(session);
    set_threads(decorated, 2);
    Decoder            dense(shape, plain), captured(shape, decorated);
    std::vector<float> queries;
    for (const Step & step : conversation(rng, shape, 2)) {
        const auto expected = dense.run(step);
        CHECK_AT_MOST(nmse(captured.run(step), expected), kMaxNmse);
        queries.insert(queries.end(), step.q.begin(), step.q.end());
    }
    int32_t head_dim, n_head;
    int64_t n_rows;
    CHECK_EQUAL(fasa_session_captured(session.get(), 0, &head_dim, &n_head, &n_rows, nullptr), FASA_STATUS_OK);
    CHECK_EQUAL(n_rows, 3);
    std::vector<float> out(head_dim * n_head * n_rows);
    CHECK_EQUAL(fasa_session_captured(session.get(), 0, &head_dim, &n_head, &n_rows, out.data()), FASA_STATUS_OK);
    CHECK(out == queries);
    CHECK_EQUAL(fasa_session_captured(session.get(), 3, &head_dim, &n_head, &n_rows, nullptr), FASA_STATUS_STATE);
}
