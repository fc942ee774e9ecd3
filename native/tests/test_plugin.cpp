// The plugin without a tool around it: its environment, profile files, which sessions exist, statistics, and the check
// of a graph against a profile's model.
#include <gguf.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <numeric>
#include <thread>

#include "decoder.h"
#include "model_check.h"
#include "plugin/sessions.h"
#include "plugin/settings.h"
#include "plugin/statistics.h"
#include "profile_file.h"
#include "status.h"

using namespace fasa_test;
using fasa::ProfileFile;
using fasa::plugin::read_settings;
using fasa::plugin::Settings;

namespace {

using Variables = std::map<std::string, std::string>;

Settings settings_of(const Variables & variables) {
    return read_settings([&](const char * name) -> const char * {
        const auto it = variables.find(name);
        return it != variables.end() ? it->second.c_str() : nullptr;
    });
}

std::string sentence_of(const std::function<void()> & f) {
    try {
        f();
    } catch (const fasa::Failure & e) {
        return e.what();
    }
    return "";
}

bool contains(const std::string & text, const std::string & part) { return text.find(part) != std::string::npos; }

// A file of the profile's keys; `change` may spoil them.
struct ProfileOnDisk {
    std::string path = "/tmp/fasa-test-" + std::to_string(getpid()) + ".gguf";

    explicit ProfileOnDisk(const Shape & shape, const std::function<void(gguf_context *)> & change = nullptr) {
        const AllChunks        all(shape);
        const gguf_context_ptr file(gguf_init_empty());
        gguf_context *         g = file.get();
        gguf_set_val_u32(g, "pyfasa.version", FASA_PROFILE_VERSION);
        gguf_set_val_u64(g, "pyfasa.n_fc", 3);
        gguf_set_val_str(g, "pyfasa.model.name", "a \"test\"");
        gguf_set_val_u64(g, "pyfasa.model.n_layer", 1);
        gguf_set_val_u64(g, "pyfasa.model.n_head", shape.n_head);
        gguf_set_val_u64(g, "pyfasa.model.n_head_kv", shape.n_head_kv);
        gguf_set_val_u64(g, "pyfasa.model.head_dim", shape.head_dim);
        gguf_set_val_u64(g, "pyfasa.model.n_rot", shape.head_dim);
        gguf_set_val_str(g, "pyfasa.model.rope", "neox");
        gguf_set_val_f64(g, "pyfasa.model.rope_freq_base", 10000.0);
        gguf_set_val_u32(g, "pyfasa.n_ranked", all.view.n_ranked);
        gguf_set_arr_data(g, "pyfasa.chunks", GGUF_TYPE_UINT16, all.chunks.data(), all.chunks.size());
        gguf_set_arr_data(g, "pyfasa.bits", GGUF_TYPE_UINT8, all.bits.data(), all.bits.size());
        if (change != nullptr) {
            change(g);
        }
        CHECK(gguf_write_to_file(g, path.c_str(), true));
    }
    ~ProfileOnDisk() { std::remove(path.c_str()); }
    ProfileOnDisk(const ProfileOnDisk &)             = delete;
    ProfileOnDisk & operator=(const ProfileOnDisk &) = delete;
};

} // namespace

// ---- settings ----------------------------------------------------------------------------------------------

TEST(the_environment_becomes_settings) {
    const Settings plain = settings_of({});
    CHECK(plain.profile.empty() && plain.stats.empty() && !plain.log && !plain.min_ctx_is_given && !plain.cuda);
    CHECK(settings_of({{"PYFASA_CUDA", "1"}}).cuda && !settings_of({{"PYFASA_CUDA", "0"}}).cuda);
    CHECK_EQUAL(plain.config.budget, FASA_DEFAULT_BUDGET);
    CHECK_EQUAL(plain.config.min_ctx, FASA_PAYS_FROM * FASA_DEFAULT_BUDGET);
    CHECK_EQUAL(plain.config.enabled, 1);
    CHECK_EQUAL(settings_of({{"PYFASA_BUDGET", "100"}}).config.min_ctx, 200);
    CHECK_EQUAL(settings_of({{"PYFASA_BUDGET", "2147483647"}}).config.min_ctx, INT32_MAX);
    CHECK_EQUAL(settings_of({{"PYFASA_BUDGET", ""}}).config.budget, FASA_DEFAULT_BUDGET);

    const Settings all = settings_of({{"PYFASA_PROFILE", "p"},
                                      {"PYFASA_STATS", "s"},
                                      {"PYFASA_LOG", "1"},
                                      {"PYFASA_BUDGET", "64"},
                                      {"PYFASA_N_FC", "5"},
                                      {"PYFASA_BITS", "4"},
                                      {"PYFASA_MIN_CTX", "0"},
                                      {"PYFASA_MAX_ROWS", "1"},
                                      {"PYFASA_SINKS", "2"},
                                      {"PYFASA_RECENT", "3"},
                                      {"PYFASA_THREADS", "6"},
                                      {"PYFASA_VERIFY", "1"}});
    CHECK(all.profile == "p" && all.stats == "s" && all.log && all.min_ctx_is_given);
    const fasa_config & c = all.config;
    CHECK(c.budget == 64 && c.n_fc == 5 && c.bits == 4 && c.min_ctx == 0 && c.max_rows == 1 && c.sinks == 2);
    CHECK(c.recent == 3 && c.n_threads == 6 && c.verify == 1);
}

TEST(bad_settings_are_told_with_value_and_limit) {
    const std::vector<std::pair<Variables, std::vector<std::string>>> rows = {
        {{{"PYFASA_BUDGET", "much"}}, {"PYFASA_BUDGET is 'much'", "1 to 2147483647"}},
        {{{"PYFASA_BUDGET", " "}}, {"PYFASA_BUDGET is ' '"}},
        {{{"PYFASA_BUDGET", "0x10"}}, {"PYFASA_BUDGET is '0x10'"}},
        {{{"PYFASA_BUDGET", "0"}}, {"PYFASA_BUDGET is '0'"}},
        {{{"PYFASA_BUDGET", "99999999999999999999"}}, {"PYFASA_BUDGET is '99999999999999999999'"}},
        {{{"PYFASA_MIN_CTX", "-1"}}, {"PYFASA_MIN_CTX is '-1'", "0 to"}},
        {{{"PYFASA_MAX_ROWS", "65"}}, {"PYFASA_MAX_ROWS is '65'", "0 to 64"}},
        {{{"PYFASA_VERIFY", "2"}}, {"PYFASA_VERIFY is '2'", "0 to 1"}},
        {{{"PYFASA_BITS", "3"}}, {"index_bits is 3"}},
        {{{"PYFASA_BUDGET", "8"}}, {"exceed the budget 8"}},
        {{{"PYFASA_BUDGET", std::string(5000, '7')}}, {"PYFASA_BUDGET is '777"}},
    };
    for (const auto & [variables, words] : rows) {
        const std::string sentence = sentence_of([&, v = &variables] { settings_of(*v); });
        const Case        text(sentence);
        for (const std::string & word : words) {
            CHECK(contains(sentence, word));
        }
    }
}

// ---- profile files -----------------------------------------------------------------------------------------

TEST(a_profile_file_is_read) {
    const Shape         shape;
    const AllChunks     all(shape);
    const ProfileOnDisk disk(shape);
    const ProfileFile   file(disk.path);
    CHECK(file.name == "a \"test\"" && file.n_fc == 3 && file.model.rope == FASA_ROPE_NEOX);
    CHECK(file.chunks == all.chunks && file.bits == all.bits && file.profile.center == nullptr);
    CHECK(file.profile.chunks == file.chunks.data());
}

TEST(bad_profile_files_are_refused) {
    const Shape shape;
    using Change                                           = std::function<void(gguf_context *)>;
    const std::vector<std::pair<Change, std::string>> rows = {
        {[](gguf_context * g) { gguf_remove_key(g, "pyfasa.version"); }, "holds no pyfasa profile"},
        {[](gguf_context * g) { gguf_set_val_u32(g, "pyfasa.version", 99); }, "has version 99"},
        {[](gguf_context * g) { gguf_set_val_str(g, "pyfasa.version", "1"); }, "not a whole number"},
        {[](gguf_context * g) { gguf_remove_key(g, "pyfasa.chunks"); }, "pyfasa.chunks is missing"},
        {[](gguf_context * g) { gguf_set_val_u32(g, "pyfasa.chunks", 1); }, "pyfasa.chunks is not an array"},
        {[](gguf_context * g) { gguf_set_val_u64(g, "pyfasa.model.n_layer", 2); }, "pyfasa.chunks is not an array"},
        {[](gguf_context * g) { gguf_set_val_i64(g, "pyfasa.model.n_layer", -1); }, "n_layer is -1"},
        {[](gguf_context * g) { gguf_set_val_u64(g, "pyfasa.n_fc", UINT64_MAX); }, "pyfasa.n_fc is -1"},
        {[](gguf_context * g) { gguf_set_val_str(g, "pyfasa.model.rope", "mrope"); }, "is 'mrope'"},
        {[](gguf_context * g) { gguf_set_val_u32(g, "pyfasa.model.rope_freq_base", 1); }, "not a number"},
        {[](gguf_context * g) {
             const float few[2] = {1, 2};
             gguf_set_arr_data(g, "pyfasa.scale", GGUF_TYPE_FLOAT32, few, 2);
         },
         "pyfasa.scale is not an array"},
        {[](gguf_context * g) {
             const std::vector<uint16_t> same(2 * 32, 7);
             gguf_set_arr_data(g, "pyfasa.chunks", GGUF_TYPE_UINT16, same.data(), same.size());
         },
         "Chunk 7"},
    };
    for (const auto & [change, words] : rows) {
        const ProfileOnDisk disk(shape, change);
        const std::string   sentence = sentence_of([&] { const ProfileFile file(disk.path); });
        const Case          text(sentence + " / " + words);
        CHECK(contains(sentence, words) && contains(sentence, disk.path));
    }
    CHECK(contains(sentence_of([] { const ProfileFile file("/nowhere"); }), "/nowhere cannot be read"));
}

// ---- sessions ----------------------------------------------------------------------------------------------

namespace {

fasa::plugin::Sessions * served = nullptr;

// Every backend of the CPU belongs to a session while this lives.
struct Serving {
    explicit Serving(fasa::plugin::Sessions & sessions) {
        static const fasa::SessionSource source = {
            [](ggml_backend_dev_t device) { return served->of_new_backend(device); },
            [](fasa::Session * session) { served->backend_freed(session); },
        };
        served = &sessions;
        fasa::serve_all(&source);
    }
    ~Serving() { fasa::serve_all(nullptr); }
    Serving(const Serving &)             = delete;
    Serving & operator=(const Serving &) = delete;
};

Step decode_step(std::mt19937 & rng, const Shape & shape) {
    std::vector<int64_t> cells(100);
    std::iota(cells.begin(), cells.end(), 0);
    return random_step(rng, shape, cells, 100);
}

} // namespace

TEST(each_backend_has_a_session_for_its_life) {
    std::mt19937             rng = fresh_rng();
    const Shape              shape;
    const ProfileOnDisk      disk(shape);
    const ProfileFile        profile(disk.path);
    const Settings           settings = settings_of({{"PYFASA_BUDGET", "40"}, {"PYFASA_MIN_CTX", "0"}});
    std::vector<std::string> told;
    fasa::plugin::Sessions   sessions(settings, profile, [&](const std::string & s) { told.push_back(s); });
    const auto               init = [] {
        return fasa::seam::of(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU))->iface.init_backend;
    };
    const auto before = init();
    {
        const Serving serving(sessions);
        for (int round = 1; round <= 2; ++round) {
            const Backend a = new_backend();
            Backend       b;
            std::thread([&] { b = new_backend(); }).join(); // of another thread: another session
            Decoder first(shape, a);
            Decoder second(shape, b);
            first.run(decode_step(rng, shape));
            second.run(decode_step(rng, shape));
            second.run(decode_step(rng, shape));
            const auto t = sessions.totals();
            CHECK_EQUAL(t.n_alive, 2);
            CHECK_EQUAL(t.n_sessions, 2 * round);
            CHECK_EQUAL(t.counters.nodes[FASA_REASON_SPARSE], 3 * round);
        }
        CHECK_EQUAL(sessions.totals().n_alive, 0);
        CHECK_EQUAL(sessions.totals().counters.nodes[FASA_REASON_SPARSE], 6); // of sessions that are gone
    }
    CHECK(init() == before);
    CHECK(told.empty());
}

TEST(a_cache_of_another_model_stays_dense_beside_one_of_the_profile) {
    std::mt19937 rng = fresh_rng();
    const Shape  shape;
    Shape        other = shape;
    other.n_head       = 8;
    other.n_head_kv    = 4;
    const ProfileOnDisk      disk(shape);
    const ProfileFile        profile(disk.path);
    const Settings           settings = settings_of({{"PYFASA_BUDGET", "40"}, {"PYFASA_MIN_CTX", "0"}});
    std::vector<std::string> told;
    fasa::plugin::Sessions   sessions(settings, profile, [&](const std::string & s) { told.push_back(s); });
    const Backend            plain = new_backend();
    const Serving            serving(sessions);
    const Backend            backend = new_backend(); // of an rpc-server, say, with two contexts of a client
    Decoder                  ours(shape, backend);
    Decoder                  theirs(other, backend);
    Decoder                  dense(other, plain);
    for (int i = 0; i < 3; ++i) {
        ours.run(decode_step(rng, shape));
        const Step step = decode_step(rng, other);
        CHECK(theirs.run(step) == dense.run(step));
    }
    CHECK_EQUAL(told.size(), 1);
    CHECK(contains(told.at(0), "8 heads and 4 KV heads"));
    const fasa_counters c = sessions.totals().counters;
    CHECK_EQUAL(c.nodes[FASA_REASON_SPARSE], 3);
    CHECK_EQUAL(c.nodes[FASA_REASON_SHAPE], 3);
}

TEST(what_is_wrong_with_a_profile_and_settings_together_is_told_at_once) {
    const Shape         shape;
    const ProfileOnDisk disk(shape);
    const ProfileFile   profile(disk.path);
    const Settings      settings = settings_of({{"PYFASA_N_FC", "33"}});
    CHECK(contains(sentence_of([&] { const fasa::plugin::Sessions s(settings, profile, nullptr); }),
                   "PYFASA_N_FC is 33; the profile ranks 32"));
}

// ---- the check of a graph ----------------------------------------------------------------------------------

TEST(a_graph_tells_its_model_as_far_as_it_goes) {
    const ggml_init_params params = {4 << 20, nullptr, true};
    const ggml_context_ptr ctx(ggml_init(params));
    ggml_context *         c       = ctx.get();
    const fasa_model       model   = {2, 4, 2, 64, 64, FASA_ROPE_NEOX, 10000.0};
    const auto             node_of = [&](int layer, int n_rot, int mode, float base, bool rotated, bool rope) {
        ggml_tensor * q = ggml_new_tensor_3d(c, GGML_TYPE_F32, 64, 4, 1);
        ggml_tensor * p = ggml_new_tensor_1d(c, GGML_TYPE_I32, 1);
        q = rope ? ggml_rope_ext(c, q, p, nullptr, n_rot, mode, 0, base, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f) : q;
        if (rotated) {
            q               = ggml_mul_mat(c, ggml_new_tensor_2d(c, GGML_TYPE_F32, 64, 64), q);
            q->op_params[1] = GGML_HINT_SRC0_IS_HADAMARD;
        }
        ggml_tensor * cache = ggml_new_tensor_3d(c, GGML_TYPE_F16, 128, 256, 1);
        ggml_format_name(cache, "cache_k_l%d", layer);
        ggml_tensor * k = ggml_permute(c, ggml_view_4d(c, cache, 64, 2, 256, 1, 128, 256, 256 * 256, 0), 0, 2, 1, 3);
        return ggml_flash_attn_ext(c, ggml_permute(c, q, 0, 2, 1, 3), k, k, nullptr, 1.0f, 0.0f, 0.0f);
    };
    for (const bool rotated : {false, true}) {
        CHECK(fasa::difference(node_of(1, 64, 2, 10000.0f, rotated, true), 1, model).empty());
        CHECK(contains(fasa::difference(node_of(1, 32, 2, 10000.0f, rotated, true), 1, model), "32 dims"));
        CHECK(contains(fasa::difference(node_of(1, 64, 0, 10000.0f, rotated, true), 1, model), "type 0"));
        CHECK(contains(fasa::difference(node_of(1, 64, 2, 5e5f, rotated, true), 1, model), "base 500000"));
        CHECK(fasa::difference(node_of(1, 64, 0, 10000.0f, rotated, false), 1, model).empty()); // the trail ends
    }
    CHECK(contains(fasa::difference(node_of(2, 64, 2, 10000.0f, false, true), 2, model), "a layer 2"));

    const auto graph_of = [&](const std::vector<int> & layers, bool logits) {
        ggml_cgraph * graph = ggml_new_graph(c);
        for (const int layer : layers) {
            ggml_build_forward_expand(graph, node_of(layer, 64, 2, 10000.0f, false, true));
        }
        ggml_tensor * last = ggml_scale(c, ggml_new_tensor_1d(c, GGML_TYPE_F32, 1), 2.0f);
        ggml_set_name(last, logits ? "result_output" : "l_out-1");
        ggml_build_forward_expand(graph, last);
        return graph;
    };
    const std::vector<bool> used = {false, true, true};
    CHECK(fasa::missing_layer(graph_of({0, 1, 2}, true), used).empty());
    CHECK(fasa::missing_layer(graph_of({1, 2}, true), used).empty());
    CHECK(contains(fasa::missing_layer(graph_of({0, 1}, true), used), "no attention in layer 2"));
    CHECK(fasa::missing_layer(graph_of({0, 1}, false), used).empty()); // a part of the model
    CHECK(fasa::missing_layer(graph_of({2}, true), used).empty());
    CHECK(fasa::missing_layer(graph_of({}, true), used).empty());
}

// ---- statistics --------------------------------------------------------------------------------------------

TEST(statistics_are_json_and_replace_the_file_whole) {
    const ProfileOnDisk  disk{Shape()};
    const ProfileFile    profile(disk.path);
    Settings             settings = settings_of({{"PYFASA_BUDGET", "40"}});
    fasa::plugin::Totals totals;
    totals.counters.nodes[FASA_REASON_SPARSE] = 7;
    fasa::plugin::add(totals.counters, &totals.counters);
    settings.profile       = "a\\b\"c\n";
    const std::string json = fasa::plugin::to_json(totals, settings, profile);
    CHECK(contains(json, "\"profile\": \"a\\\\b\\\"c\\u000a\""));
    CHECK(contains(json, "\"model\": \"a \\\"test\\\"\""));
    CHECK(contains(json, "\"sparse\": 14,"));
    CHECK(contains(json, "\"budget\": 40,"));
    CHECK(fasa::plugin::write_file(disk.path, json).empty());
    CHECK(contains(fasa::plugin::write_file("/nowhere/file", json), "'/nowhere/file', which cannot be written"));
}
