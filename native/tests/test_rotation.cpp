// Is q rotated by a Hadamard matrix, and by which? From the graph where it shows it, else by llama.cpp's own rule.
#include <cstdlib>

#include "decoder.h"
#include "hadamard.h"
#include "kernels.h"
#include "plan.h"

using namespace fasa_test;

namespace {

enum class Query { leaf, multiplied, multiplied_contiguous, multiplied_without_hint };

struct Row {
    Query     query;
    int32_t   matrix; // side of the Hadamard matrix
    int32_t   head_dim;
    ggml_type k_type;
    int32_t   expected;
};

int32_t rotation_of(const Row & row) {
    const ggml_init_params params = {16 << 20, nullptr, false};
    const Context          ctx(ggml_init(params));
    ggml_context *         c = ctx.get();
    ggml_tensor *          q = ggml_new_tensor_4d(c, GGML_TYPE_F32, row.head_dim, 4, 1, 1);
    if (row.query != Query::leaf) {
        ggml_tensor * h = ggml_new_tensor_2d(c, GGML_TYPE_F32, row.matrix, row.matrix);
        ggml_tensor * r = ggml_mul_mat(c, h, ggml_reshape_2d(c, q, row.matrix, ggml_nelements(q) / row.matrix));
        if (row.query != Query::multiplied_without_hint) {
            ggml_mul_mat_set_hint(r, GGML_HINT_SRC0_IS_HADAMARD);
        }
        q = ggml_reshape_4d(c, r, row.head_dim, 4, 1, 1);
        q = ggml_view_4d(c, q, row.head_dim, 4, 1, 1, q->nb[1], q->nb[2], q->nb[3], 0);
    }
    q = ggml_permute(c, q, 0, 2, 1, 3);
    q = row.query == Query::multiplied_contiguous ? ggml_cont(c, q) : q;
    ggml_tensor * cache[2];
    for (ggml_tensor *& t : cache) {
        ggml_tensor * root = ggml_new_tensor_2d(c, row.k_type, row.head_dim * 2, 64);
        ggml_set_name(root, "cache_k_l0");
        t = ggml_permute(c,
                         ggml_view_4d(c, root, row.head_dim, 2, 64, 1, ggml_row_size(row.k_type, row.head_dim),
                                      root->nb[1], root->nb[2], 0),
                         0, 2, 1, 3);
    }
    ggml_tensor * mask = ggml_new_tensor_4d(c, GGML_TYPE_F16, 64, 1, 1, 1);
    std::fill_n(static_cast<uint16_t *>(mask->data), 64, 0);
    const ggml_tensor * node = ggml_flash_attn_ext(c, q, cache[0], cache[1], mask, 1.0f, 0.0f, 0.0f);

    Shape shape;
    shape.head_dim = row.head_dim;
    const AllChunks        source(shape);
    const fasa::Profile    profile(source.view);
    const auto             layouts = profile.layouts(0, 0);
    const fasa_config      config  = config_of(4);
    fasa::MaskCache        masks;
    fasa::Plan             out{};
    const fasa::WriteOrder order(node->src[1]->view_src);
    CHECK_EQUAL(fasa::plan(node, {&profile, layouts.get(), &config, &masks, &order}, false, &out), FASA_REASON_SPARSE);
    return out.rotation;
}

// Sets LLAMA_ATTN_ROT_DISABLE for a scope.
struct Disable {
    explicit Disable(const char * value) { setenv("LLAMA_ATTN_ROT_DISABLE", value, 1); }
    ~Disable() { unsetenv("LLAMA_ATTN_ROT_DISABLE"); }
};

void check_rows(const std::vector<Row> & rows) {
    for (const Row & row : rows) {
        const Case c("head_dim " + std::to_string(row.head_dim) + " matrix " + std::to_string(row.matrix) + " type " +
                     ggml_type_name(row.k_type) + " query " + std::to_string(static_cast<int>(row.query)));
        CHECK_EQUAL(rotation_of(row), row.expected);
    }
}

} // namespace

TEST(rotation_is_found_in_the_graph) {
    check_rows({
        {Query::multiplied, 128, 128, GGML_TYPE_Q8_0, 128},
        {Query::multiplied, 64, 128, GGML_TYPE_Q8_0, 64},
        {Query::multiplied, 32, 96, GGML_TYPE_F16, 32},
        {Query::multiplied_contiguous, 64, 64, GGML_TYPE_Q8_0, 64},
        // another matrix: the trail ends at an operation, so q is known not to be rotated
        {Query::multiplied_without_hint, 64, 64, GGML_TYPE_Q8_0, 0},
    });
}

TEST(rotation_follows_llama_cpp_where_the_trail_ends) {
    check_rows({
        {Query::leaf, 0, 64, GGML_TYPE_Q8_0, 64},
        {Query::leaf, 0, 128, GGML_TYPE_Q8_0, 128},
        {Query::leaf, 0, 192, GGML_TYPE_Q8_0, 64},
        {Query::leaf, 0, 256, GGML_TYPE_Q8_0, 256},
        {Query::leaf, 0, 96, GGML_TYPE_Q8_0, 0},
        {Query::leaf, 0, 32, GGML_TYPE_Q8_0, 0},
        {Query::leaf, 0, 128, GGML_TYPE_F16, 0},
    });
}

TEST(rotation_can_be_disabled_as_in_llama_cpp) {
    {
        const Disable one("1");
        check_rows({{Query::leaf, 0, 128, GGML_TYPE_Q8_0, 0}, {Query::multiplied, 128, 128, GGML_TYPE_Q8_0, 128}});
    }
    {
        const Disable zero("0");
        check_rows({{Query::leaf, 0, 128, GGML_TYPE_Q8_0, 128}});
    }
}

namespace {

// Keys of the first cells as the session reads them, and as they lie in the cache with the rotation undone.
void check_keys(const Session & session, const Decoder & decoder, int64_t n) {
    const Shape &      s = decoder.shape();
    std::vector<float> keys(n * s.n_head_kv * s.head_dim), expected(keys.size());
    int32_t            dim, heads;
    CHECK_EQUAL(fasa_session_keys(session.get(), 0, 0, n, &dim, &heads, nullptr), FASA_STATUS_OK);
    CHECK(dim == s.head_dim && heads == s.n_head_kv);
    CHECK_EQUAL(fasa_session_keys(session.get(), 0, 0, n, &dim, &heads, keys.data()), FASA_STATUS_OK);
    for (int64_t i = 0; i < n * s.n_head_kv; ++i) {
        const auto * row = static_cast<const char *>(decoder.k_cache()->data) +
                           i * static_cast<int64_t>(ggml_row_size(s.k_type, s.head_dim));
        fasa::kv_to_float(s.k_type, row, s.head_dim, expected.data() + i * s.head_dim);
        fasa::undo_rotation(expected.data() + i * s.head_dim, s.head_dim, s.head_dim);
    }
    CHECK_AT_MOST(nmse(keys, expected), 1e-12);
}

} // namespace

TEST(keys_come_back_in_the_rope_basis) {
    std::mt19937 rng = fresh_rng();
    Shape        shape;
    shape.k_type = GGML_TYPE_Q8_0; // 64 dims: rotated, by the rule
    const AllChunks profile(shape);
    const Session   session = new_session(&profile.view, config_of(16));
    const Backend   backend = decorated_backend(session);
    Decoder         decoder(shape, backend);
    float           none;
    int32_t         dim, heads;
    CHECK_EQUAL(fasa_session_keys(session.get(), 0, 0, 1, &dim, &heads, &none), FASA_STATUS_STATE);
    decoder.run(random_step(rng, shape, {0, 1, 2, 3, 4}, 5));
    check_keys(session, decoder, 5);
    CHECK_EQUAL(fasa_session_keys(session.get(), 0, 0, 1000, &dim, &heads, &none), FASA_STATUS_ARGUMENT);
    CHECK_EQUAL(fasa_session_keys(session.get(), 0, 3, 2, &dim, &heads, &none), FASA_STATUS_ARGUMENT);
}

TEST(keys_come_back_in_the_rope_basis_after_a_dense_node) {
    std::mt19937 rng = fresh_rng();
    Shape        shape;
    shape.k_type = GGML_TYPE_Q8_0;
    const AllChunks profile(shape);
    const Session   session = new_session(&profile.view, config_of(16));
    const Backend   backend = decorated_backend(session);
    Decoder         decoder(shape, backend);
    Step            prefill = random_step(rng, shape, {0, 1, 2, 3, 4}, 5);
    prefill.n_rows          = 9;
    prefill.q               = gaussian(rng, 9 * shape.head_dim * shape.n_head);
    const auto row          = prefill.mask;
    for (int i = 1; i < 9; ++i) {
        prefill.mask.insert(prefill.mask.end(), row.begin(), row.end());
    }
    decoder.run(prefill);
    CHECK_EQUAL(counters_of(session).nodes[FASA_REASON_PREFILL], 1);
    check_keys(session, decoder, 5);
}
