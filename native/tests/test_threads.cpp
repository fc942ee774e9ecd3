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
constexpr int    kSteps        = 4;

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

// What one decode step is fed with: `n_rows` query rows in each of `n_stream` streams of a cache.
struct BatchShape : Shape {
    int64_t n_rows = 1, n_stream = 1;

    std::string text() const {
        return Shape::text() + " rows " + std::to_string(n_rows) + " streams " + std::to_string(n_stream);
    }
};

struct Batch {
    std::vector<int64_t>  cells; // counted through all streams
    std::vector<float>    k, v, q;
    std::vector<uint16_t> mask;
};

// Rows see other numbers of cells, and streams other numbers of blocks.
Batch random_batch(std::mt19937 & rng, const BatchShape & s, int64_t first, int64_t last) {
    Batch batch;
    for (int64_t stream = 0; stream < s.n_stream; ++stream) {
        for (int64_t cell = first; cell < last; ++cell) {
            batch.cells.push_back(stream * s.n_cell + cell);
        }
        for (int64_t row = 0; row < s.n_rows; ++row) {
            const int64_t n_seen = 60 + (64 * stream + 7 * row + last) % 190;
            for (int64_t cell = 0; cell < s.n_cell; ++cell) {
                batch.mask.push_back(cell < n_seen && (cell == 0 || rng() % 16 != 0) ? 0 : 0xfc00);
            }
        }
    }
    const size_t width = static_cast<size_t>(s.head_dim) * s.n_head_kv * batch.cells.size();
    batch.k            = gaussian(rng, width);
    batch.v            = gaussian(rng, width);
    batch.q            = gaussian(rng, s.head_dim * s.n_head * s.n_rows * s.n_stream, 2.0f);
    return batch;
}

// A layer's cache with streams, and the graph of one step on it.
class Layer {
  public:
    Layer(const BatchShape & shape, const Backend & backend) : s_(shape), backend_(backend.get()) {
        const ggml_init_params params = {1 << 20, nullptr, true};
        ctx_.reset(ggml_init(params));
        const int64_t width = static_cast<int64_t>(s_.head_dim) * s_.n_head_kv;
        k_                  = ggml_new_tensor_3d(ctx_.get(), s_.k_type, width, s_.n_cell, s_.n_stream);
        v_                  = ggml_new_tensor_3d(ctx_.get(), s_.v_type, width, s_.n_cell, s_.n_stream);
        ggml_set_name(k_, "cache_k_l0");
        ggml_set_name(v_, "cache_v_l0");
        buffer_.reset(ggml_backend_alloc_ctx_tensors(ctx_.get(), backend_));
        ggml_backend_buffer_clear(buffer_.get(), 0);
    }

    std::vector<float> run(const Batch & batch) {
        const ggml_init_params params = {1 << 20, nullptr, true};
        const Context          ctx(ggml_init(params));
        ggml_context *         c     = ctx.get();
        const int64_t          width = static_cast<int64_t>(s_.head_dim) * s_.n_head_kv;
        const int64_t          n_new = static_cast<int64_t>(batch.cells.size());

        ggml_tensor * k     = ggml_new_tensor_2d(c, GGML_TYPE_F32, width, n_new);
        ggml_tensor * v     = ggml_new_tensor_2d(c, GGML_TYPE_F32, width, n_new);
        ggml_tensor * cells = ggml_new_tensor_1d(c, GGML_TYPE_I64, n_new);
        ggml_tensor * q     = ggml_new_tensor_4d(c, GGML_TYPE_F32, s_.head_dim, s_.n_rows, s_.n_head, s_.n_stream);
        ggml_tensor * mask  = ggml_new_tensor_4d(c, GGML_TYPE_F16, s_.n_cell, s_.n_rows, 1, s_.n_stream);
        ggml_cgraph * graph = ggml_new_graph(c);
        ggml_build_forward_expand(graph, ggml_set_rows(c, flat(c, k_), k, cells));
        ggml_build_forward_expand(graph, ggml_set_rows(c, flat(c, v_), v, cells));
        ggml_tensor * out = ggml_flash_attn_ext(c, q, view(c, k_), view(c, v_), mask, s_.scale(), 0.0f, 0.0f);
        ggml_build_forward_expand(graph, out);

        const Buffer buffer(ggml_backend_alloc_ctx_tensors(c, backend_));
        const auto   set = [](ggml_tensor * t, const auto & x) {
            CHECK_EQUAL(x.size() * sizeof(x[0]), ggml_nbytes(t));
            ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
        };
        set(k, batch.k);
        set(v, batch.v);
        set(q, batch.q);
        set(mask, batch.mask);
        set(cells, batch.cells);
        CHECK_EQUAL(ggml_backend_graph_compute(backend_, graph), GGML_STATUS_SUCCESS);
        std::vector<float> result(ggml_nelements(out));
        ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
        return result;
    }

  private:
    ggml_tensor * flat(ggml_context * c, ggml_tensor * cache) const {
        return ggml_reshape_2d(c, cache, cache->ne[0], s_.n_cell * s_.n_stream);
    }
    ggml_tensor * view(ggml_context * c, ggml_tensor * cache) const {
        ggml_tensor * all = ggml_view_4d(c, cache, s_.head_dim, s_.n_head_kv, s_.n_cell, s_.n_stream,
                                         ggml_row_size(cache->type, s_.head_dim), cache->nb[1], cache->nb[2], 0);
        return ggml_permute(c, all, 0, 2, 1, 3);
    }

    BatchShape     s_;
    ggml_backend_t backend_;
    Context        ctx_;
    ggml_tensor *  k_;
    ggml_tensor *  v_;
    Buffer         buffer_;
};

// A session whose graphs run here: custom nodes on `n_threads` threads as ggml would call them, all others one by one
// on the backend's own graph_compute.
class Threaded {
  public:
    Threaded(const fasa_profile & profile, const fasa_config & config, const BatchShape & shape, int n_threads)
        : session_(&profile, config), backend_(new_backend()), n_threads_(n_threads) {
        fasa::register_session(&session_);
        fasa::seam::Backend * backend = fasa::seam::of(backend_.get());
        inner_                        = backend->iface.graph_compute;
        backend->iface.graph_compute  = [](ggml_backend_t b, ggml_cgraph * graph) {
            return current->session_.compute(b, graph, on_threads);
        };
        layer_ = std::make_unique<Layer>(shape, backend_);
    }
    ~Threaded() {
        layer_.reset();
        fasa::unregister_session(&session_);
    }
    Threaded(const Threaded &)             = delete;
    Threaded & operator=(const Threaded &) = delete;

    std::vector<float> run(const Batch & batch) {
        current = this;
        return layer_->run(batch);
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

    fasa::Session          session_;
    Backend                backend_;
    int                    n_threads_;
    fasa::GraphCompute     inner_;
    std::unique_ptr<Layer> layer_;
};

thread_local Threaded * Threaded::current = nullptr;

std::vector<Batch> random_batches(std::mt19937 & rng, const BatchShape & shape) {
    std::vector<Batch> batches = {random_batch(rng, shape, 0, 150)};
    for (int i = 1; i < kSteps; ++i) {
        batches.push_back(random_batch(rng, shape, 149 + i, 150 + i));
    }
    return batches;
}

BatchShape shape_of(int32_t n_head, int32_t n_head_kv, ggml_type type = GGML_TYPE_F16, int64_t n_rows = 1,
                    int64_t n_stream = 1) {
    BatchShape shape;
    shape.n_head    = n_head;
    shape.n_head_kv = n_head_kv;
    shape.k_type = shape.v_type = type;
    shape.n_rows                = n_rows;
    shape.n_stream              = n_stream;
    return shape;
}

fasa_config config_for(int32_t budget) {
    fasa_config config = config_of(budget);
    config.max_rows    = 8;
    config.min_ctx     = 80; // some rows attend to all they see
    return config;
}

} // namespace

// Whole KV heads per thread, shares of the blocks, and parts of a head's selection, as heads and threads divide.
TEST(threads_share_a_node_without_races) {
    std::mt19937 rng = fresh_rng();
    for (const BatchShape & shape :
         {shape_of(4, 2), shape_of(6, 1), shape_of(8, 8, GGML_TYPE_Q8_0), shape_of(4, 2, GGML_TYPE_F16, 5, 1),
          shape_of(6, 1, GGML_TYPE_Q8_0, 1, 3), shape_of(8, 4, GGML_TYPE_F16, 3, 2)}) {
        const AllChunks          profile(shape);
        const Backend            plain = new_backend();
        Layer                    dense(shape, plain);
        const std::vector<Batch> batches = random_batches(rng, shape);
        Threaded                 alone(profile.view, config_for(12), shape, 1);

        std::vector<std::vector<float>> exact, one;
        for (const Batch & batch : batches) {
            exact.push_back(dense.run(batch));
            one.push_back(alone.run(batch));
        }
        CHECK(nmse(one.back(), exact.back()) > kMaxNmse); // 12 cells are not all: the selection shows
        for (const int n_threads : {1, 2, 3, 5, 8}) {
            for (const int32_t budget : {12, 1000}) {
                const Case c(shape.text() + " threads " + std::to_string(n_threads) + " budget " +
                             std::to_string(budget));
                Threaded   threaded(profile.view, config_for(budget), shape, n_threads);
                for (size_t i = 0; i < batches.size(); ++i) {
                    const auto actual = threaded.run(batches[i]);
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

TEST(threads_capture_queries_without_races) {
    std::mt19937     rng    = fresh_rng();
    const BatchShape shape  = shape_of(6, 2, GGML_TYPE_F16, 3);
    fasa_config      config = config_for(12);
    config.capture          = 1;
    const AllChunks profile(shape);
    const Backend   plain = new_backend();
    Layer           dense(shape, plain);
    Threaded        alone(profile.view, config, shape, 1), threaded(profile.view, config, shape, 4);

    const auto queries = [&](const Threaded & t) {
        int32_t head_dim, n_head;
        int64_t n_rows;
        t.session().captured(0, &head_dim, &n_head, &n_rows, nullptr);
        CHECK_EQUAL(n_rows, kSteps * shape.n_rows);
        std::vector<float> out(head_dim * n_head * n_rows);
        t.session().captured(0, &head_dim, &n_head, &n_rows, out.data());
        return out;
    };
    for (const Batch & batch : random_batches(rng, shape)) {
        alone.run(batch);
        CHECK_AT_MOST(nmse(threaded.run(batch), dense.run(batch)), kMaxNmse);
    }
    CHECK(queries(threaded) == queries(alone));
}

namespace {

std::vector<Step> conversation(std::mt19937 & rng, const Shape & shape) {
    std::vector<int64_t> prompt(150);
    std::iota(prompt.begin(), prompt.end(), 0);
    std::vector<Step> steps = {random_step(rng, shape, prompt, 150)};
    for (int i = 1; i < kSteps; ++i) {
        steps.push_back(random_step(rng, shape, {149 + i}, 150 + i));
    }
    return steps;
}

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
