// plan(): one row per reason to replace an attention node or to leave it alone.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>

#include "decoder.h"
#include "half.h"

using namespace fasa_test;

namespace {

constexpr int64_t kCells = 256;
constexpr int64_t kSeen  = 100;

using fasa::kHalfMinusInf;

// How the node of a row differs from one that is replaced.
struct NodeSpec {
    int32_t      head_dim = 64, n_head = 4, n_head_kv = 2, n_head_v = 2;
    int64_t      n_kv = kCells, n_rows = 1, n_stream = 1;
    int64_t      v_dim  = 64;
    ggml_type    k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16;
    const char * k_name = "cache_k_l0";
    bool         k_view = true, v_view = true;
    bool         mask     = true;
    float        max_bias = 0.0f;
    int32_t      n_kv_max = 0;
    bool         no_alloc = false;
    int64_t      n_seen   = kSeen; // by every row
    // Last changes to the finished node.
    std::function<void(ggml_context *, ggml_tensor *)> edit;
};

struct Node {
    Context       ctx;
    ggml_tensor * node;
};

ggml_tensor * cache_view(ggml_context * c, ggml_type type, const char * name, int64_t dim, int64_t heads,
                         const NodeSpec & s, bool as_view) {
    if (!as_view) {
        ggml_tensor * fresh = ggml_new_tensor_4d(c, type, dim, s.n_kv, heads, s.n_stream);
        ggml_set_name(fresh, name);
        return fresh;
    }
    ggml_tensor * cache = ggml_new_tensor_3d(c, type, dim * heads, kCells, s.n_stream);
    ggml_set_name(cache, name);
    ggml_tensor * cells =
        ggml_view_4d(c, cache, dim, heads, s.n_kv, s.n_stream, ggml_row_size(type, dim), cache->nb[1], cache->nb[2], 0);
    return ggml_permute(c, cells, 0, 2, 1, 3);
}

Node make_node(const NodeSpec & s) {
    const ggml_init_params params = {8 << 20, nullptr, s.no_alloc};
    Context                ctx(ggml_init(params));
    ggml_context *         c = ctx.get();
    ggml_tensor *          q = ggml_new_tensor_4d(c, GGML_TYPE_F32, s.head_dim, s.n_rows, s.n_head, s.n_stream);
    ggml_tensor *          k = cache_view(c, s.k_type, s.k_name, s.head_dim, s.n_head_kv, s, s.k_view);
    ggml_tensor *          v = cache_view(c, s.v_type, "cache_v_l0", s.v_dim, s.n_head_v, s, s.v_view);
    ggml_tensor * mask       = s.mask ? ggml_new_tensor_4d(c, GGML_TYPE_F16, s.n_kv, s.n_rows, 1, s.n_stream) : nullptr;
    if (mask != nullptr && !s.no_alloc) {
        auto * p = static_cast<uint16_t *>(mask->data);
        std::fill(p, p + ggml_nelements(mask), kHalfMinusInf);
        for (int64_t row = 0; row < s.n_rows * s.n_stream; ++row) {
            std::fill(p + row * s.n_kv, p + row * s.n_kv + s.n_seen, 0);
        }
    }
    ggml_tensor * node = ggml_flash_attn_ext(c, q, k, v, mask, 0.125f, s.max_bias, 0.0f);
    if (s.n_kv_max != 0) {
        ggml_flash_attn_ext_set_n_kv_max(node, s.n_kv_max);
    }
    if (s.edit != nullptr) {
        s.edit(c, node);
    }
    return {std::move(ctx), node};
}

fasa::WriteOrder order_of(const ggml_tensor * node) {
    const ggml_tensor * k = fasa::before_cast(node->src[1]);
    return fasa::WriteOrder(k->view_src != nullptr ? k->view_src : k);
}

struct Row {
    const char * what;
    fasa_reason  reason;
    NodeSpec     node;
    fasa_config  config     = config_of(16);
    bool         profile    = true;
    bool         empty_rows = false; // the profile keeps no chunk for layer 0
    bool         sliding    = false;
    bool         followed   = true;
};

std::vector<Row> rows() {
    std::vector<Row> all;
    const auto       add = [&](const char * what, fasa_reason reason, const std::function<void(Row &)> & change) {
        Row row{what, reason, NodeSpec()};
        change(row);
        all.push_back(row);
    };
    const auto edit = [&](const char * what, fasa_reason reason,
                          const std::function<void(ggml_context *, ggml_tensor *)> & change) {
        add(what, reason, [&](Row & r) { r.node.edit = change; });
    };

    add("decode step", FASA_REASON_SPARSE, [](Row &) {});
    add("q8_0 K, f16 V", FASA_REASON_SPARSE, [](Row & r) { r.node.k_type = GGML_TYPE_Q8_0; });
    add("f16 K, q8_0 V", FASA_REASON_SPARSE, [](Row & r) { r.node.v_type = GGML_TYPE_Q8_0; });
    add("V head size of its own", FASA_REASON_SPARSE, [](Row & r) { r.node.v_dim = 96; });
    add("exactly min_ctx visible", FASA_REASON_SPARSE, [](Row & r) { r.config.min_ctx = kSeen; });
    add("fewer KV heads than the profile's most", FASA_REASON_SPARSE,
        [](Row & r) { r.node.n_head_kv = r.node.n_head_v = 1; });
    add("group of 64", FASA_REASON_SPARSE, [](Row & r) { r.node.n_head = 128; });

    add("switched off", FASA_REASON_DISABLED, [](Row & r) { r.config.enabled = 0; });
    add("switched off, prefill", FASA_REASON_DISABLED, [](Row & r) {
        r.config.enabled = 0;
        r.node.n_rows    = 7;
    });
    add("one row more than max_rows", FASA_REASON_PREFILL, [](Row & r) { r.node.n_rows = r.config.max_rows + 1; });
    add("a row more than one", FASA_REASON_PREFILL, [](Row & r) {
        r.node.n_rows     = 2;
        r.config.max_rows = 1;
    });
    add("max_rows rows", FASA_REASON_SPARSE, [](Row & r) { r.node.n_rows = r.config.max_rows; });
    add("three streams of two rows", FASA_REASON_SPARSE, [](Row & r) {
        r.node.n_stream = 3;
        r.node.n_rows   = 2;
    });
    edit("a view that begins inside a stream", FASA_REASON_STREAMS,
         [](ggml_context *, ggml_tensor * n) { n->src[1]->view_offs = 5 * n->src[1]->nb[1]; });
    edit("a view past the last stream", FASA_REASON_STREAMS,
         [](ggml_context *, ggml_tensor * n) { n->src[1]->view_offs = kCells * n->src[1]->nb[1]; });
    add("several streams while capturing", FASA_REASON_STREAMS, [](Row & r) {
        r.node.n_stream  = 2;
        r.config.capture = 1;
    });
    add("sliding window", FASA_REASON_SWA, [](Row & r) { r.sliding = true; });
    add("sliding window while capturing", FASA_REASON_SWA, [](Row & r) {
        r.sliding        = true;
        r.config.capture = 1;
    });
    add("sliding window without a profile", FASA_REASON_SWA, [](Row & r) {
        r.sliding = true;
        r.profile = false;
    });

    add("K computed in the graph", FASA_REASON_NO_CACHE, [](Row & r) { r.node.k_view = false; });
    add("V computed in the graph", FASA_REASON_NO_CACHE, [](Row & r) { r.node.v_view = false; });
    for (const char * name : {"k", "cache_k_l", "cache_k_l0 (view)", "cache_v_l0", "xcache_k_l0", "cache_k_l0x"}) {
        add(name, FASA_REASON_NO_CACHE, [&](Row & r) { r.node.k_name = name; });
    }
    add("a cache that another session follows", FASA_REASON_NO_CACHE, [](Row & r) { r.followed = false; });
    add("ALiBi", FASA_REASON_ALIBI, [](Row & r) { r.node.max_bias = 8.0f; });
    add("n_kv_max", FASA_REASON_N_KV_MAX, [](Row & r) { r.node.n_kv_max = 64; });

    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                 GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL}) {
        add(ggml_type_name(type), FASA_REASON_SPARSE, [&](Row & r) { r.node.k_type = type; });
        add(ggml_type_name(type), FASA_REASON_SPARSE, [&](Row & r) { r.node.v_type = type; });
        CHECK_EQUAL(fasa_kv_row_bytes(type, 96), ggml_row_size(type, 96));
    }
    edit("f32 K and V, cast to f16", FASA_REASON_SPARSE, [](ggml_context * c, ggml_tensor * n) {
        for (const int i : {1, 2}) {
            n->src[i]->type = n->src[i]->view_src->type = GGML_TYPE_F32;
            n->src[i]->nb[0]                            = sizeof(float);
            n->src[i]                                   = ggml_cast(c, n->src[i], GGML_TYPE_F16);
        }
    });
    for (const ggml_type type : {GGML_TYPE_MXFP4, GGML_TYPE_TQ2_0}) {
        add("K type", FASA_REASON_KV_TYPE, [&](Row & r) { r.node.k_type = type, r.node.head_dim = 256; });
        add("V type", FASA_REASON_KV_TYPE, [&](Row & r) { r.node.v_type = type, r.node.v_dim = 256; });
    }
    add("head size 80", FASA_REASON_KV_TYPE, [](Row & r) { r.node.head_dim = 80; });
    add("V head size 288", FASA_REASON_KV_TYPE, [](Row & r) { r.node.v_dim = 288; });
    edit("f16 query", FASA_REASON_KV_TYPE, [](ggml_context *, ggml_tensor * n) { n->src[0]->type = GGML_TYPE_F16; });

    add("caches without an address", FASA_REASON_KV_MEMORY, [](Row & r) { r.node.no_alloc = true; });

    add("more KV heads than the profile", FASA_REASON_SHAPE, [](Row & r) { r.node.n_head_kv = r.node.n_head_v = 4; });
    add("head size not the profile's", FASA_REASON_SHAPE, [](Row & r) { r.node.head_dim = 128; });
    add("group of 65", FASA_REASON_SHAPE, [](Row & r) { r.node.n_head = 130; });
    add("V with other heads", FASA_REASON_SHAPE, [](Row & r) { r.node.n_head_v = 1; });

    add("no mask", FASA_REASON_MASK, [](Row & r) { r.node.mask = false; });
    edit("f32 mask", FASA_REASON_MASK,
         [](ggml_context * c, ggml_tensor * n) { n->src[3] = ggml_new_tensor_4d(c, GGML_TYPE_F32, kCells, 1, 1, 1); });
    edit("mask of another length", FASA_REASON_MASK, [](ggml_context * c, ggml_tensor * n) {
        n->src[3] = ggml_new_tensor_4d(c, GGML_TYPE_F16, kCells - 64, 1, 1, 1);
    });
    edit("mask per head", FASA_REASON_MASK,
         [](ggml_context * c, ggml_tensor * n) { n->src[3] = ggml_new_tensor_4d(c, GGML_TYPE_F16, kCells, 1, 4, 1); });
    edit("mask computed in the graph", FASA_REASON_MASK, [](ggml_context * c, ggml_tensor * n) {
        n->src[3] = ggml_cast(c, ggml_new_tensor_4d(c, GGML_TYPE_F32, kCells, 1, 1, 1), GGML_TYPE_F16);
    });
    edit("mask without data", FASA_REASON_MASK, [](ggml_context *, ggml_tensor * n) { n->src[3]->data = nullptr; });

    add("no profile", FASA_REASON_NO_PROFILE, [](Row & r) { r.profile = false; });
    add("layer past the profile", FASA_REASON_NO_PROFILE, [](Row & r) { r.node.k_name = "cache_k_l1"; });
    add("layer without chunks", FASA_REASON_NO_PROFILE, [](Row & r) { r.empty_rows = true; });

    add("below min_ctx", FASA_REASON_SHORT_CONTEXT, [](Row & r) { r.config.min_ctx = kSeen + 1; });
    add("nothing visible", FASA_REASON_SHORT_CONTEXT, [](Row & r) { r.node.n_seen = 0; });

    add("capture", FASA_REASON_CAPTURE, [](Row & r) { r.config.capture = 1; });
    add("capture, switched off, prefill, no profile", FASA_REASON_CAPTURE, [](Row & r) {
        r.config.capture = 1;
        r.config.enabled = 0;
        r.node.n_rows    = 5;
        r.profile        = false;
    });
    add("capture with ALiBi", FASA_REASON_ALIBI, [](Row & r) {
        r.config.capture = 1;
        r.node.max_bias  = 8.0f;
    });
    return all;
}

} // namespace

TEST(plan_gives_the_reason_of_every_row) {
    std::map<fasa_reason, int> seen;
    for (const Row & row : rows()) {
        const Case c(row.what);
        AllChunks  source{Shape()}; // 64 dims, 2 KV heads, 1 layer
        if (row.empty_rows) {
            std::fill(source.bits.begin(), source.bits.begin() + 32, 0); // one head is enough
        }
        const fasa::Profile    profile(source.view);
        const auto             layouts = profile.layouts(0, 0);
        const Node             node    = make_node(row.node);
        fasa::MaskCache        masks;
        fasa::Plan             out{};
        const fasa::WriteOrder order = order_of(node.node);
        const fasa_reason reason = fasa::plan(node.node,
                                              {row.profile ? &profile : nullptr, row.profile ? layouts.get() : nullptr,
                                               &row.config, &masks, row.followed ? &order : nullptr},
                                              row.sliding, &out);
        if (reason != row.reason) {
            fail_check(__FILE__, __LINE__,
                       std::string("plan says ") + fasa_reason_name(reason) + ", expected " +
                           fasa_reason_name(row.reason));
        }
        if (reason == FASA_REASON_SPARSE) {
            CHECK_EQUAL(out.layer, 0);
            CHECK_EQUAL(out.n_head, row.node.n_head);
            CHECK_EQUAL(out.n_head_kv, row.node.n_head_kv);
            CHECK_EQUAL(out.rows.size(), row.node.n_rows * row.node.n_stream);
            CHECK_EQUAL(out.n_block.size(), row.node.n_stream);
            for (const fasa::Row & r : out.rows) {
                CHECK_EQUAL(r.visible->n_cell, kSeen);
                CHECK_EQUAL(r.visible->n_block, 2);
                CHECK(!r.attend_all);
            }
            CHECK(std::strcmp(out.k_root->name, row.node.k_name) == 0);
        }
        ++seen[reason];
    }
    for (int32_t reason = 0; reason < FASA_REASON_COUNT; ++reason) {
        const Case c(fasa_reason_name(reason));
        // These two are the session's: plan allocates nothing and sees one node.
        const bool of_session = reason == FASA_REASON_NO_MEMORY || reason == FASA_REASON_CACHE_VIEWS;
        CHECK_EQUAL(seen.count(static_cast<fasa_reason>(reason)), of_session ? 0 : 1);
    }
}

TEST(every_reason_has_a_name_and_a_sentence) {
    for (int32_t reason = 0; reason < FASA_REASON_COUNT; ++reason) {
        const std::string text = fasa_reason_text(reason);
        CHECK(std::string(fasa_reason_name(reason)) != "unknown");
        CHECK(text.size() > 10 && text.back() == '.');
    }
    CHECK(std::string(fasa_reason_name(-1)) == "unknown");
    CHECK(std::string(fasa_reason_name(FASA_REASON_COUNT)) == "unknown");
}

TEST(visible_bits_are_those_of_the_mask) {
    std::mt19937 rng = fresh_rng();
    for (const int64_t n_kv : {1, 63, 64, 65, 113, 250}) {
        NodeSpec spec;
        spec.n_kv            = n_kv;
        spec.n_seen          = 0;
        const Node node      = make_node(spec);
        auto *     mask      = static_cast<uint16_t *>(node.node->src[3]->data);
        int64_t    n_visible = 0, last = -1;
        for (int64_t i = 0; i < n_kv; ++i) {
            if (rng() % 3 != 0) {
                mask[i] = rng() % 2 != 0 ? 0 : 0xc000; // 0 or -2: any finite bias is visible
                last    = i;
                ++n_visible;
            }
        }
        fasa::MaskCache       masks;
        const fasa::Visible & v = masks.row(node.node->src[3], 0, 0, config_of(16), order_of(node.node), 0);
        CHECK_EQUAL(v.words.size(), (n_kv + 63) / 64);
        CHECK_EQUAL(v.n_cell, n_visible);
        CHECK_EQUAL(v.n_block, last / 64 + (last >= 0 ? 1 : 0));
        for (int64_t i = 0; i < 64 * static_cast<int64_t>(v.words.size()); ++i) {
            CHECK_EQUAL(v.words[i / 64] >> i % 64 & 1u, i < n_kv && mask[i] != kHalfMinusInf);
        }
    }
}

// Rows of one node are planned each by its own mask.
TEST(rows_shorter_than_min_ctx_attend_to_all_they_see) {
    NodeSpec spec;
    spec.n_rows     = 3;
    spec.n_stream   = 2;
    const Node node = make_node(spec);
    auto *     mask = static_cast<uint16_t *>(node.node->src[3]->data);
    const auto see  = [&](int64_t row, int64_t n) {
        std::fill(mask + row * kCells, mask + (row + 1) * kCells, kHalfMinusInf);
        std::fill(mask + row * kCells, mask + row * kCells + n, 0);
    };
    const int64_t cells[] = {10, 130, 65, 0, 64, 63};
    for (int64_t row = 0; row < 6; ++row) {
        see(row, cells[row]);
    }
    const AllChunks     source{Shape()};
    const fasa::Profile profile(source.view);
    const auto          layouts = profile.layouts(0, 0);
    const auto          order   = order_of(node.node);
    const auto          planned = [&](int32_t min_ctx, fasa::Plan * out) {
        fasa_config config = config_of(4);
        config.min_ctx     = min_ctx;
        config.sinks       = 2;
        config.recent      = 1;
        static fasa::MaskCache masks;
        masks.clear();
        return fasa::plan(node.node, {&profile, layouts.get(), &config, &masks, &order}, false, out);
    };
    fasa::Plan out{};
    CHECK_EQUAL(planned(65, &out), FASA_REASON_SPARSE);
    for (int64_t row = 0; row < 6; ++row) {
        const Case c("row " + std::to_string(row));
        CHECK_EQUAL(out.rows[row].stream, row / 3);
        CHECK_EQUAL(out.rows[row].row, row % 3);
        CHECK_EQUAL(out.rows[row].visible->n_cell, cells[row]);
        CHECK_EQUAL(out.rows[row].attend_all, cells[row] < 65);
        CHECK_EQUAL(out.rows[row].visible->forced.size(), std::min<int64_t>(3, cells[row]));
    }
    CHECK_EQUAL(out.n_block[0], 3);
    CHECK_EQUAL(out.n_block[1], 0); // nothing to score there: its index is left alone
    CHECK_EQUAL(out.rows[1].visible->forced[2], 129);
    fasa::Plan none{};
    CHECK_EQUAL(planned(131, &none), FASA_REASON_SHORT_CONTEXT);
}

TEST(the_order_of_writing_tells_first_and_last) {
    ggml_tensor root = {};
    root.ne[1]       = 10;
    root.ne[2]       = 2;
    root.nb[1]       = 4;
    int32_t data[20];
    root.data = data;
    fasa::WriteOrder order(&root);
    const auto       asked = [&](int64_t stream, int32_t n, bool first) {
        std::vector<int32_t> cells;
        first ? order.first(stream, n, {0x155}, &cells) : order.last(stream, n, {0x155}, &cells); // even cells
        return cells;
    };
    using Cells = std::vector<int32_t>;
    CHECK(asked(0, 2, true) == Cells({0, 2})); // nothing known: as they lie
    CHECK(asked(1, 3, false) == Cells({8, 6, 4}));
    for (const int64_t cell : {0, 7, 2, 14, -1, 20}) { // 14 is cell 4 of the other stream
        order.cell_written(cell);
    }
    CHECK(asked(0, 9, true) == Cells({4, 6, 8, 0, 2}));
    CHECK(asked(0, 4, false) == Cells({2, 0, 8, 6}));
    CHECK(asked(1, 2, false) == Cells({4, 8}));
    order.bytes_written(data + 4, 3 * sizeof(int32_t)); // cells 4, 5, 6: a state is loaded
    CHECK(asked(0, 9, true) == Cells({8, 0, 2, 4, 6}));
    for (int i = 0; i < 1000; ++i) { // old entries are forgotten on the way
        order.cell_written(i % 3 * 2);
    }
    CHECK(asked(0, 9, true) == Cells({8, 6, 2, 4, 0}));
    int32_t elsewhere;
    order.bytes_written(&elsewhere, sizeof(elsewhere));
    CHECK(asked(0, 9, true) == Cells({8, 6, 2, 4, 0}));
}
