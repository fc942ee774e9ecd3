// Decode graphs with several query rows and cache streams, caches of every type, masks of sliding windows, and memory
// that runs out.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "decoder.h"
#include "half.h"
#include "sliding_window.h"

using namespace fasa_test;

namespace {

constexpr double kMaxNmse = 5e-4;

std::vector<int64_t> range(int64_t first, int64_t last) {
    std::vector<int64_t> cells(last - first);
    std::iota(cells.begin(), cells.end(), first);
    return cells;
}

// Three streams of 113 cells; after a prompt in each, rows of different lengths in one graph.
std::vector<Step> three_streams(std::mt19937 & rng, const Shape & shape) {
    std::vector<int64_t> prompt;
    for (int64_t stream = 0; stream < 3; ++stream) {
        const auto cells = range(stream * shape.n_cell, stream * shape.n_cell + 90);
        prompt.insert(prompt.end(), cells.begin(), cells.end());
    }
    const int64_t n = shape.n_cell;
    return {random_rows(rng, shape, prompt, {{90}, {40}, {7}}),
            random_rows(rng, shape, {90, 91, n + 90, n + 91, 2 * n + 90, 2 * n + 91}, {{91, 92}, {41, 42}, {8, 9}}),
            random_rows(rng, shape, {n + 92}, {{1, 112, 64, 65}, {0, 64, 63, 113}, {2, 2, 2, 2}})};
}

} // namespace

TEST(rows_of_several_streams_see_their_own_cells) {
    std::mt19937 rng = fresh_rng();
    for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_F32}) {
        for (const int32_t n_head_kv : {1, 2, 3}) {
            for (const int n_threads : {1, 2, 3}) {
                Shape shape;
                shape.n_cell    = 113; // no multiple of a block
                shape.n_stream  = 3;
                shape.n_head_kv = n_head_kv;
                shape.n_head    = 2 * n_head_kv;
                shape.k_type    = type;
                shape.sinks     = n_head_kv == 2;
                const Case      c(shape.text() + " threads " + std::to_string(n_threads));
                const AllChunks profile(shape);
                const Session   session = new_session(&profile.view, config_of(113));
                const Backend   plain   = new_backend();
                const Backend   sparse  = decorated_backend(session);
                set_threads(sparse, n_threads);
                Decoder expected(shape, plain), actual(shape, sparse);
                for (const Step & step : three_streams(rng, shape)) {
                    CHECK_AT_MOST(nmse(actual.run(step), expected.run(step)), kMaxNmse);
                }
                const fasa_counters counters = counters_of(session);
                CHECK_EQUAL(counters.nodes[FASA_REASON_SPARSE], 3);
                CHECK_EQUAL(counters.verify_failures, 0);
                CHECK_EQUAL(counters.cells_attended, counters.cells_visible);
            }
        }
    }
}

TEST(a_row_selects_as_if_it_were_alone) {
    std::mt19937 rng = fresh_rng();
    for (const int n_threads : {1, 2, 3, 8}) {
        const Case      c("threads " + std::to_string(n_threads));
        Shape           shape;
        const AllChunks profile(shape);
        fasa_config     config = config_of(20);
        config.min_ctx         = 50;
        config.recent          = 3;
        const Session one = new_session(&profile.view, config), all = new_session(&profile.view, config);
        const Backend one_backend = decorated_backend(one), all_backend = decorated_backend(all);
        set_threads(all_backend, n_threads);
        Decoder    alone(shape, one_backend), together(shape, all_backend);
        const Step prompt = random_step(rng, shape, range(0, 200), 200);
        alone.run(prompt);
        together.run(prompt);
        const std::vector<int64_t> seen    = {200, 49, 131, 50, 199, 1};
        const Step                 rows    = random_rows(rng, shape, {}, {seen});
        const std::vector<float>   found   = together.run(rows);
        int64_t                    n_short = 0;
        for (size_t r = 0; r < seen.size(); ++r) {
            Step row   = rows;
            row.n_rows = 1;
            row.mask.assign(rows.mask.begin() + r * shape.n_cell, rows.mask.begin() + (r + 1) * shape.n_cell);
            row.q.clear();
            for (int32_t h = 0; h < shape.n_head; ++h) {
                const auto q = rows.q.begin() + (h * seen.size() + r) * shape.head_dim;
                row.q.insert(row.q.end(), q, q + shape.head_dim);
            }
            const size_t             size = static_cast<size_t>(shape.head_dim) * shape.n_head;
            const std::vector<float> mine(found.begin() + r * size, found.begin() + (r + 1) * size);
            // A row below min_ctx is dense when alone and exact here.
            const bool is_short = std::count(row.mask.begin(), row.mask.end(), 0) < config.min_ctx;
            CHECK_AT_MOST(nmse(mine, alone.run(row)), is_short ? kMaxNmse : 1e-10);
            n_short += is_short ? 1 : 0;
        }
        CHECK(n_short >= 2);
        CHECK_EQUAL(counters_of(one).nodes[FASA_REASON_SHORT_CONTEXT], n_short);
        CHECK_EQUAL(counters_of(all).nodes[FASA_REASON_SPARSE], 2);
        CHECK_EQUAL(counters_of(all).verify_failures, 0);
    }
}

// Upstream rounds queries to 8 bits beside a quantized K, and we do not: one draw of queries may go past the limit,
// which is meant for larger tensors; the mean of all may not.
TEST(every_cache_type_decodes_as_upstream_does) {
    std::mt19937    rng     = fresh_rng();
    double          sum     = 0.0;
    int             n       = 0;
    const ggml_type types[] = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,  GGML_TYPE_Q4_0,
                               GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL};
    for (const ggml_type k_type : types) {
        for (const ggml_type v_type : types) {
            Shape shape;
            shape.n_cell = 113;
            shape.k_type = k_type;
            shape.v_type = v_type;
            const Case      c(shape.text());
            const AllChunks profile(shape);
            const Session   session = new_session(&profile.view, config_of(113));
            const Backend   plain = new_backend(), sparse = decorated_backend(session);
            Decoder         expected(shape, plain), actual(shape, sparse);
            for (const Step & step :
                 {random_step(rng, shape, range(0, 100), 100), random_step(rng, shape, {100}, 101)}) {
                const double error = nmse(actual.run(step), expected.run(step));
                CHECK_AT_MOST(error, 3 * kMaxNmse);
                sum += error, ++n;
            }
            CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], 2);
            CHECK_EQUAL(counters_of(session).verify_failures, 0);
        }
    }
    CHECK_AT_MOST(sum / n, kMaxNmse);
}

// Models may have other numbers of KV heads in other layers; a profile has room for the most.
TEST(a_layer_with_fewer_kv_heads_uses_the_first_rows_of_its_profile) {
    std::mt19937 rng = fresh_rng();
    Shape        most;
    most.n_head_kv = 4;
    Shape shape;
    shape.k_type = GGML_TYPE_Q8_0;
    const AllChunks profile(most);
    for (const int32_t budget : {256, 30}) {
        const Session session = new_session(&profile.view, config_of(budget));
        const Backend plain = new_backend(), sparse = decorated_backend(session);
        Decoder       expected(shape, plain), actual(shape, sparse);
        const Step    step  = random_step(rng, shape, range(0, 200), 200);
        const double  error = nmse(actual.run(step), expected.run(step));
        CHECK(budget == 256 ? error <= kMaxNmse : error > kMaxNmse);
        CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], 1);
        CHECK_EQUAL(counters_of(session).verify_failures, 0);
    }
}

// llama.cpp casts an f32 cache to f16 for each token; a cast that somebody else reads must still be computed.
TEST(a_cast_with_another_reader_is_computed) {
    std::mt19937 rng = fresh_rng();
    Shape        shape;
    shape.k_type = shape.v_type = GGML_TYPE_F32;
    const AllChunks    profile(shape);
    const Session      session = new_session(&profile.view, config_of(256));
    const Backend      sparse  = decorated_backend(session);
    Decoder            decoder(shape, sparse);
    std::vector<float> copied;
    const Step         step = random_step(rng, shape, range(0, 100), 100);
    for (const bool shared : {false, true}) {
        const Backend reader = new_backend();
        decoder.run(step, nullptr, [&](ggml_context * c, const Decoder &) -> std::vector<ggml_tensor *> {
            ggml_tensor * node = ggml_get_first_tensor(c);
            while (node->op != GGML_OP_FLASH_ATTN_EXT) {
                node = ggml_get_next_tensor(c, node);
            }
            if (!shared) {
                return {};
            }
            ggml_tensor * sum = ggml_sum(c, ggml_cast(c, node->src[1], GGML_TYPE_F32));
            ggml_set_name(sum, "sum");
            return {sum};
        });
        if (shared) {
            const std::vector<float> sums     = decoder.read("sum");
            double                   expected = 0;
            for (int64_t i = 0; i < 100 * shape.head_dim * shape.n_head_kv; ++i) {
                expected += ggml_fp16_to_fp32(ggml_fp32_to_fp16(step.k[i]));
            }
            CHECK_AT_MOST(std::fabs(sums.at(0) - expected), 1e-2);
        }
    }
    CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], 2);
}

// ---- sliding windows -----------------------------------------------------------------------------------------

namespace {

// A graph of attention nodes, one per layer, each with its own mask that shows the last `sees` of 200 cells.
struct Windowed {
    Context       ctx;
    ggml_cgraph * graph;

    explicit Windowed(const std::vector<int64_t> & sees, int64_t n_kv = 256) {
        ctx.reset(ggml_init({16 << 20, nullptr, false}));
        ggml_context * c = ctx.get();
        graph            = ggml_new_graph(c);
        std::vector<ggml_tensor *> masks; // one per number of cells
        for (size_t layer = 0; layer < sees.size(); ++layer) {
            ggml_tensor * cache[2];
            for (ggml_tensor *& t : cache) {
                ggml_tensor * root = ggml_new_tensor_2d(c, GGML_TYPE_F16, 128, n_kv);
                ggml_format_name(root, "cache_k_l%d", static_cast<int>(layer));
                t = ggml_permute(c, ggml_view_4d(c, root, 64, 2, n_kv, 1, 128, root->nb[1], root->nb[2], 0), 0, 2, 1,
                                 3);
            }
            const size_t  known = std::find(sees.begin(), sees.begin() + layer, sees[layer]) - sees.begin();
            ggml_tensor * mask  = known < layer ? masks[known] : ggml_new_tensor_4d(c, GGML_TYPE_F16, n_kv, 1, 1, 1);
            masks.push_back(mask);
            auto * p = static_cast<uint16_t *>(mask->data);
            std::fill(p, p + n_kv, fasa::kHalfMinusInf);
            std::fill(p + 200 - std::abs(sees[layer]), p + 200, 0);
            ggml_build_forward_expand(graph, ggml_flash_attn_ext(c, ggml_new_tensor_4d(c, GGML_TYPE_F32, 64, 1, 2, 1),
                                                                 cache[0], cache[1], mask, 1.0f, 0.0f, 0.0f));
        }
    }
};

} // namespace

TEST(a_layer_that_sees_less_than_another_slides) {
    fasa::SlidingWindows plain;
    plain.learn(Windowed({100, 100, 100}).graph);
    CHECK(!plain.contains(0) && !plain.contains(2));

    fasa::SlidingWindows windows;
    windows.learn(Windowed({100, -100, 100}).graph); // two masks that are still alike
    CHECK(windows.contains(0) && windows.contains(1));
    windows.learn(Windowed({150, 100, 150}).graph);
    CHECK(!windows.contains(0) && windows.contains(1) && !windows.contains(2));
    CHECK(windows.contains(3));                   // a layer that no graph has shown
    windows.learn(Windowed({50, -50, 50}).graph); // a new short context: what was learned stays
    CHECK(!windows.contains(0) && windows.contains(1));
}

// As on a GPU: masks that the host cannot see come by way of a reader, which waits for the device each time.
TEST(masks_elsewhere_are_read_while_they_may_tell) {
    fasa::SlidingWindows windows;
    int                  n_reads = 0;
    bool                 fails   = false;
    const auto           read    = [&](const ggml_tensor * mask, size_t offset, size_t bytes, void * out) {
        ++n_reads;
        std::memcpy(out, static_cast<const char *>(mask->data) + offset, bytes);
        return !fails;
    };
    const auto learn = [&](const Windowed & graph, int64_t max_rows) {
        n_reads = 0;
        return windows.learn(graph.graph, read, max_rows);
    };
    CHECK(!learn(Windowed({100, 100, 100}), 8)); // one mask: nothing to tell apart
    CHECK_EQUAL(n_reads, 0);
    CHECK(learn(Windowed({100, -100, 100}), 8)); // news: there are two
    CHECK_EQUAL(n_reads, 2);
    CHECK(!learn(Windowed({150, 100, 150}), 8)); // as long as those before
    CHECK_EQUAL(n_reads, 0);
    CHECK(windows.contains(0) && windows.contains(1));
    fails = true;
    CHECK(!learn(Windowed({150, 100, 150}, 512), 8));
    CHECK_EQUAL(n_reads, 2);
    CHECK(windows.contains(0) && windows.contains(1));
    fails = false;
    CHECK(!learn(Windowed({150, 100, 150}, 512), 8));
    CHECK_EQUAL(n_reads, 0);
    CHECK(learn(Windowed({150, 100, 150}, 512), 0)); // a prompt: it has more rows than max_rows
    CHECK_EQUAL(n_reads, 2);
    CHECK(!windows.contains(0) && windows.contains(1) && !windows.contains(2));
    CHECK(!learn(Windowed({150, 100, 150}, 768), 0)); // all is known
    CHECK_EQUAL(n_reads, 0);
    CHECK(learn(Windowed({150, 100, 150, 100}, 1024), 8)); // a layer more
    CHECK(!windows.contains(2) && windows.contains(3));
}

TEST(a_mask_made_in_the_graph_is_not_read) {
    Windowed graph({150, 100});
    for (int i = 0; i < ggml_graph_n_nodes(graph.graph); ++i) {
        ggml_tensor * node = ggml_graph_node(graph.graph, i);
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            node->src[3]->op = GGML_OP_CPY; // a cast of an input, as some versions of llama.cpp have it
        }
    }
    fasa::SlidingWindows windows;
    windows.learn(graph.graph, [](const ggml_tensor *, size_t, size_t, void *) -> bool {
        throw std::logic_error("read before it is there");
    });
    CHECK(windows.contains(0) && windows.contains(1));
}

TEST(a_device_with_one_mask_learns_of_windows_from_another) {
    fasa::SlidingWindows windows;
    windows.learn(Windowed({100, 100}).graph);
    CHECK(!windows.several_masks() && !windows.contains(0));
    CHECK(windows.suspect() && !windows.suspect());
    windows.learn(Windowed({150, 150}).graph);
    CHECK(windows.several_masks() && windows.contains(0) && windows.contains(1)); // which it has, nobody knows
}

// ---- memory --------------------------------------------------------------------------------------------------

TEST(memory_that_runs_out_leaves_dense_graphs) {
    std::mt19937 rng = fresh_rng();
    const Shape  shape;
    struct Injected {
        explicit Injected(int64_t n) { fasa_fail_allocations(n); }
        ~Injected() { fasa_fail_allocations(-1); }
    };
    for (int64_t successes = 0; successes < 7; ++successes) { // 2 KV heads of the index, 5 work arrays
        const Case      c("allocation " + std::to_string(successes));
        const AllChunks profile(shape);
        const Session   session = new_session(&profile.view, config_of(20));
        const Backend   plain = new_backend(), sparse = decorated_backend(session);
        Decoder         expected(shape, plain), actual(shape, sparse);
        const Step      first = random_step(rng, shape, range(0, 120), 120);
        {
            const Injected failure(successes);
            CHECK_EQUAL(nmse(actual.run(first), expected.run(first)), 0);
        }
        CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_NO_MEMORY], 1);
        CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], 0);
        const Step second = random_step(rng, shape, {120}, 121);
        CHECK(nmse(actual.run(second), expected.run(second)) > 0);
        CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], 1);
        CHECK_EQUAL(counters_of(session).verify_failures, 0);
    }
}
