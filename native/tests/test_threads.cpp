// Decoding on threads that ThreadSanitizer can follow: it does not see the barriers of the OpenMP runtime inside ggml.
#include <atomic>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>
#include <thread>

#include "backend.h"
#include "decoder.h"
#include "seam.h"
#include "session.h"

using namespace fasa_test;

namespace {

constexpr double kMaxNmse      = 5e-4;  // what llama.cpp allows between its own backends for flash attention
constexpr double kMaxThreadSum = 1e-10; // sums of float32 in another order
constexpr int    kSteps        = 3;

// Runs all at once and passes on the first exception.
void at_once(const std::vector<std::function<void()>> & tasks) {
    std::vector<std::exception_ptr> failures(tasks.size());
    std::vector<std::thread>        threads;
    for (size_t i = 0; i < tasks.size(); ++i) {
        threads.emplace_back([&, i] {
            try {
                tasks[i]();
            } catch (...) {
                failures[i] = std::current_exception();
            }
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    for (const std::exception_ptr & failure : failures) {
        if (failure != nullptr) {
            std::rethrow_exception(failure);
        }
    }
}

// A session whose graphs run here: custom nodes on `n_threads` threads as ggml would call them, all others one by one
// on the backend's own graph_compute.
class Threaded {
  public:
    Threaded(const fasa_profile & profile, const fasa_config & config, const Shape & shape, int n_threads)
        : session_(&profile, config), backend_(new_backend()), n_threads_(n_threads) {
        fasa::register_session(&session_);
        fasa::seam::Backend * backend = fasa::seam::of(backend_.get());
        inner_                        = backend->iface.graph_compute;
        backend->iface.graph_compute  = [](ggml_backend_t b, ggml_cgraph * graph) {
            return current->session_.compute(b, graph, on_threads);
        };
        decoder_ = std::make_unique<Decoder>(shape, backend_);
    }
    ~Threaded() {
        decoder_.reset();
        fasa::unregister_session(&session_);
    }
    Threaded(const Threaded &)             = delete;
    Threaded & operator=(const Threaded &) = delete;

    std::vector<float> run(const Step & step) {
        current = this;
        return decoder_->run(step);
    }

    const fasa::Session & session() const { return session_; }

  private:
    static ggml_status on_threads(ggml_backend_t backend, ggml_cgraph * graph) {
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            ggml_tensor * node = ggml_graph_node(graph, i);
            if (node->op == GGML_OP_CUSTOM) {
                run_custom(node);
                continue;
            }
            const ggml_init_params params = {1 << 16, nullptr, true};
            const Context          ctx(ggml_init(params));
            ggml_cgraph *          one = ggml_new_graph_custom(ctx.get(), 8, false);
            ggml_graph_add_node(one, node);
            const ggml_status status = current->inner_(backend, one);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
        }
        return GGML_STATUS_SUCCESS;
    }

    static void run_custom(ggml_tensor * node) {
        fasa::seam::CustomOp op;
        std::memcpy(&op, node->op_params, sizeof(op));
        const int n_threads = current->n_threads_;

        std::vector<std::function<void()>> tasks;
        for (int i = 0; i < n_threads; ++i) {
            tasks.emplace_back([=] { op.fun(node, i, n_threads, op.userdata); });
        }
        at_once(tasks);
    }

    static thread_local Threaded * current; // a backend's slots have no room for more

    fasa::Session            session_;
    Backend                  backend_;
    int                      n_threads_;
    fasa::GraphCompute       inner_;
    std::unique_ptr<Decoder> decoder_;
};

thread_local Threaded * Threaded::current = nullptr;

Shape shape_of(int32_t n_head, int32_t n_head_kv, ggml_type type = GGML_TYPE_F16, int64_t n_stream = 1) {
    Shape shape;
    shape.n_head    = n_head;
    shape.n_head_kv = n_head_kv;
    shape.n_stream  = n_stream;
    shape.k_type = shape.v_type = type;
    return shape;
}

// A prompt of 150 cells in each stream, then one cell of each per step. Rows see other numbers of cells and blocks.
std::vector<Step> conversation(std::mt19937 & rng, const Shape & shape, int64_t n_rows = 1) {
    std::vector<Step> steps;
    for (int64_t i = 0; i < kSteps; ++i) {
        std::vector<int64_t>              cells;
        std::vector<std::vector<int64_t>> n_seen(shape.n_stream);
        for (int64_t stream = 0; stream < shape.n_stream; ++stream) {
            for (int64_t cell = i == 0 ? 0 : 149 + i; cell < 150 + i; ++cell) {
                cells.push_back(stream * shape.n_cell + cell);
            }
            for (int64_t row = 0; row < n_rows; ++row) {
                n_seen[stream].push_back(150 + i - (70 * stream + 50 * row) % 120);
            }
        }
        steps.push_back(random_rows(rng, shape, cells, n_seen));
    }
    return steps;
}

fasa_config config_for(int32_t budget) {
    fasa_config config = config_of(budget);
    config.max_rows    = 8;
    config.min_ctx     = 60; // some rows attend to all they see
    return config;
}

} // namespace

// Whole KV heads per thread, shares of the blocks, and parts of a head's selection, as heads and threads divide.
TEST(threads_share_a_node_without_races) {
    std::mt19937 rng = fresh_rng();
    for (const auto & [shape, n_rows] : std::vector<std::pair<Shape, int64_t>>{{shape_of(4, 2), 1},
                                                                               {shape_of(6, 1), 1},
                                                                               {shape_of(8, 8, GGML_TYPE_Q8_0), 1},
                                                                               {shape_of(4, 2), 5},
                                                                               {shape_of(6, 1, GGML_TYPE_Q8_0, 3), 1},
                                                                               {shape_of(8, 4, GGML_TYPE_F16, 2), 3}}) {
        const AllChunks         profile(shape);
        const Backend           plain = new_backend();
        Decoder                 dense(shape, plain);
        const std::vector<Step> steps = conversation(rng, shape, n_rows);
        Threaded                alone(profile.view, config_for(12), shape, 1);

        std::vector<std::vector<float>> exact, one;
        for (const Step & step : steps) {
            exact.push_back(dense.run(step));
            one.push_back(alone.run(step));
        }
        CHECK(nmse(one.back(), exact.back()) > kMaxNmse); // 12 cells are not all: the selection shows
        for (const int n_threads : {1, 2, 3, 5, 8}) {
            for (const int32_t budget : {12, 1000}) {
                const Case c(shape.text() + " rows " + std::to_string(n_rows) + " threads " +
                             std::to_string(n_threads) + " budget " + std::to_string(budget));
                Threaded   threaded(profile.view, config_for(budget), shape, n_threads);
                for (size_t i = 0; i < steps.size(); ++i) {
                    const auto actual = threaded.run(steps[i]);
                    if (budget > shape.n_cell) {
                        CHECK_AT_MOST(nmse(actual, exact[i]), kMaxNmse);
                    } else {
                        CHECK_AT_MOST(nmse(actual, one[i]), kMaxThreadSum);
                    }
                }
                const fasa_counters found = threaded.session().counters(), wanted = alone.session().counters();
                CHECK_EQUAL(found.nodes[FASA_REASON_SPARSE], kSteps);
                CHECK_EQUAL(found.verify_failures, 0);
                CHECK_EQUAL(found.cells_indexed, wanted.cells_indexed);
                CHECK_EQUAL(found.cells_verified, wanted.cells_verified);
                if (budget < shape.n_cell) {
                    CHECK_EQUAL(found.cells_attended, wanted.cells_attended);
                }
            }
        }
    }
}

TEST(fewer_threads_than_there_are_do_the_same) {
    std::mt19937                    rng   = fresh_rng();
    const Shape                     shape = shape_of(6, 2);
    const AllChunks                 profile(shape);
    const std::vector<Step>         steps = conversation(rng, shape);
    Threaded                        alone(profile.view, config_for(12), shape, 1);
    std::vector<std::vector<float>> one;
    for (const Step & step : steps) {
        one.push_back(alone.run(step));
    }
    for (const int32_t limit : {1, 2, 3, 7, 100}) {
        const Case  c("limit " + std::to_string(limit));
        fasa_config config = config_for(12);
        config.n_threads   = limit;
        Threaded threaded(profile.view, config, shape, 7);
        for (size_t i = 0; i < steps.size(); ++i) {
            CHECK_AT_MOST(nmse(threaded.run(steps[i]), one[i]), kMaxThreadSum);
        }
        CHECK_EQUAL(threaded.session().counters().cells_attended, alone.session().counters().cells_attended);
    }
}

TEST(threads_capture_queries_without_races) {
    std::mt19937 rng    = fresh_rng();
    const Shape  shape  = shape_of(6, 2);
    fasa_config  config = config_for(12);
    config.capture      = 1;
    const AllChunks profile(shape);
    const Backend   plain = new_backend();
    Decoder         dense(shape, plain);
    Threaded        alone(profile.view, config, shape, 1), threaded(profile.view, config, shape, 4);

    const auto queries = [&](const Threaded & t) {
        int32_t head_dim, n_head;
        int64_t n_rows;
        t.session().captured(0, &head_dim, &n_head, &n_rows, nullptr);
        CHECK_EQUAL(n_rows, kSteps * 3);
        std::vector<float> out(head_dim * n_head * n_rows);
        t.session().captured(0, &head_dim, &n_head, &n_rows, out.data());
        return out;
    };
    for (const Step & step : conversation(rng, shape, 3)) {
        alone.run(step);
        CHECK_AT_MOST(nmse(threaded.run(step), dense.run(step)), kMaxNmse);
    }
    CHECK(queries(threaded) == queries(alone));
}

namespace {

// A model of its own, from the first call to the last.
void whole_life(uint32_t seed, const Shape & shape, const std::atomic<bool> * go_on = nullptr) {
    std::mt19937            rng(seed);
    const AllChunks         profile(shape);
    const std::vector<Step> steps = conversation(rng, shape);
    const Backend           plain = new_backend();
    Decoder                 dense(shape, plain);
    do {
        const Session session = new_session(&profile.view, config_of(1000));
        const Backend backend = decorated_backend(session);
        Decoder       decoder(shape, backend);
        for (const Step & step : steps) {
            CHECK_AT_MOST(nmse(decoder.run(step), dense.run(step)), kMaxNmse);
        }
        CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], kSteps);
        CHECK_EQUAL(counters_of(session).verify_failures, 0);
    } while (go_on != nullptr && *go_on);
}

} // namespace

TEST(two_sessions_live_in_two_threads) {
    const uint32_t seed = run_seed();
    for (int i = 0; i < 3; ++i) {
        at_once({[=] { whole_life(seed, shape_of(4, 2)); }, [=] { whole_life(seed + 1, shape_of(6, 1)); },
                 [] { CHECK_EQUAL(fasa_self_test(), FASA_STATUS_OK); }});
    }
}

// A buffer with an indexed cache goes while another session's graph runs, and its own.
TEST(a_cache_is_freed_while_others_decode) {
    const uint32_t    seed = run_seed();
    std::atomic<bool> go_on{true};
    at_once({[&] { whole_life(seed, shape_of(4, 2), &go_on); },
             [&] {
                 std::mt19937    rng(seed + 1);
                 const Shape     shape = shape_of(6, 1);
                 const AllChunks profile(shape);
                 const Session   session = new_session(&profile.view, config_of(1000));
                 const Backend   backend = decorated_backend(session);
                 const auto      steps   = conversation(rng, shape);
                 for (int i = 0; i < 10; ++i) {
                     Decoder kept(shape, backend), freed(shape, backend);
                     freed.run(steps[0]);
                     at_once({[&] { kept.run(steps[0]); }, [&] { freed.free_cache(); }});
                     kept.run(steps[1]);
                     CHECK_EQUAL(counters_of(session).verify_failures, 0);
                 }
                 go_on = false;
             }});
}

TEST(settings_change_and_counters_are_read_while_decoding) {
    std::mt19937            rng   = fresh_rng();
    const Shape             shape = shape_of(4, 2);
    const AllChunks         four(shape, 4), two(shape, 2);
    const std::vector<Step> steps   = conversation(rng, shape);
    const Session           session = new_session(&four.view, config_of(1000));
    const Backend           backend = decorated_backend(session), plain = new_backend();
    Decoder                 decoder(shape, backend), dense(shape, plain);
    std::atomic<bool>       done{false};
    int64_t                 n_reads = 0, n_changes = 0;
    at_once({[&] {
                 for (int round = 0; round < 15; ++round) {
                     for (const Step & step : steps) {
                         CHECK_AT_MOST(nmse(decoder.run(step), dense.run(step)), kMaxNmse);
                     }
                 }
                 done = true;
             },
             [&] {
                 int64_t last = 0;
                 for (; !done; ++n_reads) {
                     const fasa_counters c = counters_of(session);
                     fasa_timings        t;
                     CHECK_EQUAL(fasa_session_timings(session.get(), &t), FASA_STATUS_OK);
                     CHECK(c.graphs >= last && c.cells_attended <= c.cells_visible);
                     last = c.graphs;
                     std::this_thread::yield();
                 }
             },
             [&] {
                 for (; !done; ++n_changes) {
                     fasa_config config = config_of(1000);
                     config.n_fc        = static_cast<int32_t>(n_changes % 3);
                     config.verify      = static_cast<int32_t>(n_changes % 2);
                     CHECK_EQUAL(fasa_session_configure(session.get(), &config), FASA_STATUS_OK);
                     CHECK_EQUAL(fasa_session_set_profile(session.get(), n_changes % 2 ? &two.view : &four.view),
                                 FASA_STATUS_OK);
                     CHECK_EQUAL(fasa_session_invalidate(session.get()), FASA_STATUS_OK);
                     std::this_thread::yield();
                 }
             }});
    CHECK(n_reads > 0 && n_changes > 0);
    CHECK_EQUAL(counters_of(session).verify_failures, 0);
    CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], 15 * kSteps);
}
