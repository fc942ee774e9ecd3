// Sessions, backends and caches end in any order; what is left works on, undecorated.
#include <cstring>
#include <numeric>

#include "decoder.h"
#include "seam.h"

using namespace fasa_test;

namespace {

Step prompt(std::mt19937 & rng, const Shape & shape) {
    std::vector<int64_t> cells(100);
    std::iota(cells.begin(), cells.end(), 0);
    return random_step(rng, shape, cells, 100);
}

fasa::seam::BackendInterface plain_interface() {
    const Backend backend = new_backend();
    return fasa::seam::of(backend.get())->iface;
}

} // namespace

TEST(self_test_passes_and_leaves_nothing_decorated) {
    const auto before = fasa::seam::of(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU))->iface.init_backend;
    for (int i = 0; i < 2; ++i) {
        CHECK_EQUAL(fasa_self_test(), FASA_STATUS_OK);
    }
    CHECK(fasa::seam::of(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU))->iface.init_backend == before);
    CHECK(std::strcmp(fasa_ggml_built(), fasa_ggml_loaded()) == 0);
}

TEST(session_freed_before_the_backend) {
    std::mt19937    rng = fresh_rng();
    const Shape     shape;
    const AllChunks profile(shape);
    const Backend   plain = new_backend();
    Decoder         dense(shape, plain);
    Session         session = new_session(&profile.view, config_of(8));
    const Backend   backend = decorated_backend(session);
    CHECK_EQUAL(fasa_session_backends(session.get()), 1);
    Decoder    decoder(shape, backend);
    const Step step = prompt(rng, shape);
    decoder.run(step);
    CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], 1);
    session.reset();
    CHECK(decoder.run(step) == dense.run(step)); // undecorated again: to the last bit
    const auto iface = plain_interface();
    CHECK(std::memcmp(&fasa::seam::of(backend.get())->iface, &iface, sizeof(iface)) == 0);
    CHECK(std::memcmp(&fasa::seam::of(decoder.k_cache()->buffer)->iface,
                      &fasa::seam::of(dense.k_cache()->buffer)->iface, sizeof(fasa::seam::BufferInterface)) == 0);
}

TEST(backend_freed_before_the_session) {
    std::mt19937    rng = fresh_rng();
    const Shape     shape;
    const AllChunks profile(shape);
    const Session   session = new_session(&profile.view, config_of(8));
    for (int i = 0; i < 3; ++i) { // one session outlives several backends
        Backend backend = decorated_backend(session);
        {
            Decoder decoder(shape, backend);
            decoder.run(prompt(rng, shape));
        }
        CHECK_EQUAL(fasa_session_backends(session.get()), 1);
        backend.reset();
        CHECK_EQUAL(fasa_session_backends(session.get()), 0);
    }
    CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_SPARSE], 3);
}

TEST(cache_freed_first_takes_its_index_along) {
    std::mt19937    rng = fresh_rng();
    const Shape     shape;
    const AllChunks profile(shape);
    const Session   session = new_session(&profile.view, config_of(8));
    const Backend   backend = decorated_backend(session);
    for (int i = 0; i < 3; ++i) { // the allocator likes to give the same addresses again
        Decoder    decoder(shape, backend);
        const Step step = prompt(rng, shape);
        decoder.run(step);
        CHECK(counters_of(session).index_bytes > 0);
        CHECK_EQUAL(counters_of(session).verify_failures, 0);
        decoder.free_cache();
        CHECK_EQUAL(counters_of(session).index_bytes, 0);
        float   key;
        int32_t n;
        CHECK_EQUAL(fasa_session_keys(session.get(), 0, 0, 1, &n, &n, &key), FASA_STATUS_STATE);
    }
}

TEST(cache_outlives_session_and_backend) {
    std::mt19937    rng = fresh_rng();
    const Shape     shape;
    const AllChunks profile(shape);
    Session         session = new_session(&profile.view, config_of(8));
    Backend         backend = decorated_backend(session);
    Decoder         decoder(shape, backend);
    decoder.run(prompt(rng, shape));
    session.reset();
    backend.reset();
    const std::vector<uint8_t> zeros(ggml_nbytes(decoder.k_cache()));
    ggml_backend_tensor_set(decoder.k_cache(), zeros.data(), 0, zeros.size());
    decoder.free_cache();
}

TEST(two_sessions_at_once) {
    std::mt19937 rng = fresh_rng();
    const Shape  shape;
    Shape        wide = shape;
    wide.head_dim     = 128;
    const AllChunks narrow_profile(shape), wide_profile(wide);
    const Session   a         = new_session(&narrow_profile.view, config_of(8));
    Session         b         = new_session(&wide_profile.view, config_of(300));
    const Backend   backend_a = decorated_backend(a), backend_b = decorated_backend(b), plain = new_backend();
    CHECK_EQUAL(fasa_session_backends(a.get()), 1);
    CHECK_EQUAL(fasa_session_backends(b.get()), 1);
    Decoder    decoder_a(shape, backend_a), decoder_b(wide, backend_b), dense(wide, plain);
    const Step step_a = prompt(rng, shape), step_b = prompt(rng, wide);
    const auto first = decoder_a.run(step_a);
    CHECK_AT_MOST(nmse(decoder_b.run(step_b), dense.run(step_b)), 5e-4);
    CHECK_EQUAL(counters_of(a).graphs, 1);
    CHECK_EQUAL(counters_of(b).graphs, 1);
    b.reset(); // the other goes on, and new backends can still join it
    CHECK(decoder_a.run(step_a) == first);
    CHECK_EQUAL(counters_of(a).nodes[FASA_REASON_SPARSE], 2);
    const Backend later = decorated_backend(a);
    CHECK_EQUAL(fasa_session_backends(a.get()), 2);
    CHECK(decoder_b.run(step_b) == dense.run(step_b));
}

TEST(a_backend_made_while_disarmed_stays_plain) {
    std::mt19937    rng = fresh_rng();
    const Shape     shape;
    const AllChunks profile(shape);
    const Session   session = new_session(&profile.view, config_of(8));
    const Backend   backend = new_backend();
    Decoder         decoder(shape, backend);
    decoder.run(prompt(rng, shape));
    CHECK_EQUAL(fasa_session_backends(session.get()), 0);
    CHECK_EQUAL(counters_of(session).graphs, 0);
}

TEST(profile_and_n_fc_change_between_steps) {
    std::mt19937    rng = fresh_rng();
    const Shape     shape;
    const AllChunks four(shape, 4), two(shape, 2);
    fasa_config     config  = config_of(8);
    const Session   session = new_session(&four.view, config);
    const Backend   backend = decorated_backend(session);
    Decoder         decoder(shape, backend);
    const Step      step  = prompt(rng, shape);
    const auto      first = decoder.run(step);
    const int64_t   bytes = counters_of(session).index_bytes;
    config.n_fc           = 5;
    CHECK_EQUAL(fasa_session_configure(session.get(), &config), FASA_STATUS_OK);
    decoder.run(step);
    CHECK(counters_of(session).index_bytes < bytes / 2);
    CHECK_EQUAL(fasa_session_set_profile(session.get(), &two.view), FASA_STATUS_OK);
    decoder.run(step);
    CHECK_EQUAL(fasa_session_set_profile(session.get(), nullptr), FASA_STATUS_OK);
    decoder.run(step);
    CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_NO_PROFILE], 1);
    config.n_fc = 0;
    CHECK_EQUAL(fasa_session_set_profile(session.get(), &four.view), FASA_STATUS_OK);
    CHECK_EQUAL(fasa_session_configure(session.get(), &config), FASA_STATUS_OK);
    CHECK(decoder.run(step) == first);
    CHECK_EQUAL(counters_of(session).verify_failures, 0);
    CHECK_EQUAL(fasa_session_reset(session.get()), FASA_STATUS_OK);
    CHECK_EQUAL(counters_of(session).graphs, 0);
}

TEST(configurations_out_of_range_are_refused) {
    const AllChunks profile{Shape()};
    const Session   session = new_session(&profile.view, config_of(8));
    const auto      refused = [&](void (*change)(fasa_config &), const char * word) {
        const Case  c(word);
        fasa_config config = config_of(8);
        change(config);
        CHECK_EQUAL(fasa_session_configure(session.get(), &config), FASA_STATUS_ARGUMENT);
        const std::string text = fasa_last_error();
        CHECK(text.find(word) != std::string::npos && text.back() == '.');
    };
    refused([](fasa_config & c) { c.budget = 0; }, "budget");
    refused([](fasa_config & c) { c.n_fc = -1; }, "n_fc");
    refused([](fasa_config & c) { c.n_fc = 129; }, "n_fc");
    refused([](fasa_config & c) { c.min_ctx = -1; }, "min_ctx");
    refused([](fasa_config & c) { c.sinks = 5, c.recent = 4; }, "sinks");
    refused([](fasa_config & c) { c.sinks = c.recent = 2147483647; }, "sinks");
    refused([](fasa_config & c) { c.isa = 99; }, "Instruction set");
}
