// Scores from outside: what a scorer is given, and that its scores decide, on one thread and on several.

#include "decoder.h"

using namespace fasa_test;

namespace {

// Exact scores of visible cells; counts calls and keeps the changes it is told of.
struct Exact {
    int                  calls = 0;
    std::vector<int64_t> first_changed;
    int32_t              result = 0;
};

int32_t exact_scores(void * user, const fasa_scoring * s) {
    auto & own = *static_cast<Exact *>(user);
    ++own.calls;
    own.first_changed.push_back(s->first_changed);
    for (int32_t h = 0; h < s->n_head; ++h) {
        const float * keys = s->keys + h / (s->n_head / s->n_head_kv) * s->key_stride;
        for (int64_t c = 0; c < s->n_cell; ++c) {
            float sum = 0.0f;
            for (int32_t d = 0; d < s->head_dim; ++d) {
                sum += s->q[h * s->head_dim + d] * keys[c * s->head_dim + d];
            }
            s->scores[h * 64 * s->n_block + c] = sum;
        }
    }
    return own.result;
}

} // namespace

TEST(exact_scores_come_near_dense_attention) {
    std::mt19937 rng = fresh_rng();
    for (const int threads : {1, 3}) {
        for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0}) {
            Shape shape;
            shape.head_dim = 96;
            shape.k_type = shape.v_type = type;
            const Case      c(shape.text() + " threads " + std::to_string(threads));
            const AllChunks profile(shape);
            const Session   session   = new_session(&profile.view, config_of(200));
            const Backend   plain     = new_backend();
            const Backend   decorated = decorated_backend(session);
            set_threads(decorated, threads);
            Decoder dense(shape, plain), sparse(shape, decorated);
            Exact   exact;
            CHECK_EQUAL(fasa_session_set_scorer(session.get(), exact_scores, &exact), FASA_STATUS_OK);

            std::vector<int64_t> all(256);
            for (int64_t i = 0; i < 256; ++i) {
                all[i] = i;
            }
            Step step = random_step(rng, shape, all, 250);
            CHECK(nmse(sparse.run(step), dense.run(step)) < 0.05); // 50 cells of 250 are left out
            CHECK_EQUAL(exact.calls, 1);
            CHECK_EQUAL(exact.first_changed.back(), 0);

            step = random_step(rng, shape, {77}, 250);
            sparse.run(step);
            dense.run(step);
            CHECK_EQUAL(exact.first_changed.back(), 77);

            exact.result = 1; // a failure: everything visible is attended to
            step         = random_step(rng, shape, {78}, 250);
            CHECK(nmse(sparse.run(step), dense.run(step)) < 5e-4);

            CHECK_EQUAL(fasa_session_set_scorer(session.get(), nullptr, nullptr), FASA_STATUS_OK);
            step = random_step(rng, shape, {79}, 250);
            sparse.run(step);
            CHECK_EQUAL(exact.calls, 3);
        }
    }
}
