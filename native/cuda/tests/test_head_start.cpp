// The head start, played against a llama.cpp that sets the inputs of one token after the other: what it sets is what
// the graph finds, and what a wrong guess has overwritten comes back.
#include <ggml-cpp.h>

#include <cstring>
#include <map>

#include "../../gpu/head_start.h"
#include "../transfer.h"
#include "stage.h"

using namespace fasa_test;
using fasa::gpu::Embedding;
using fasa::gpu::HeadStart;
using fasa::gpu::Transfer;
using Bytes = std::vector<uint8_t>;

namespace {

constexpr int64_t kWidth = 64, kTokens = 50;

bool is_busy = false; // what the device says

std::shared_ptr<Stream> stream() {
    static const Api api = [] {
        Api own     = *cuda_api();
        own.is_idle = [](fasa::gpu::Device *) { return !is_busy; };
        return own;
    }();
    static const auto stream = std::make_shared<Stream>(&api, nullptr);
    return stream;
}

Bytes download(const void * from, size_t n) {
    Bytes out(n);
    CHECK_EQUAL(cuda_api()->download(stream()->device(), out.data(), from, n), 0);
    return out;
}

void upload(void * to, const void * from, size_t n) {
    CHECK_EQUAL(cuda_api()->upload(stream()->device(), to, from, n), 0);
}

template <typename T> Bytes bytes_of(const std::vector<T> & x) {
    Bytes out(x.size() * sizeof(T));
    std::memcpy(out.data(), x.data(), out.size());
    return out;
}

// What a token's inputs are, as llama.cpp sets them.
struct Inputs {
    int32_t               token = 0, pos = 0;
    int64_t               cell = 0, v_cell = 0; // through all streams; llama.cpp's are the same
    std::vector<uint16_t> mask;
    int32_t               out_id = 0;
};

// The graph of a one-layer decoder in device memory, and its caches. The other stream lies before the node's.
class Model {
  public:
    Model(std::mt19937 & rng, ggml_type type, ggml_type table_type, int64_t n_kv, bool second_stream)
        : n_kv_(n_kv), n_cell_(n_kv + 37), first_(second_stream ? n_cell_ : 0),
          ctx_(ggml_init({1 << 20, nullptr, true})), memory_(stream(), 1 << 20), totals_(stream(), 4),
          table_(gaussian(rng, kTokens * kWidth)) {
        scratch_.reset(ggml_backend_cpu_buffer_from_ptr(memory_.get(), 1 << 19));
        lasting_.reset(ggml_backend_cpu_buffer_from_ptr(memory_.get() + (1 << 19), 1 << 19));
        ggml_backend_buffer_set_usage(scratch_.get(), GGML_BACKEND_BUFFER_USAGE_COMPUTE);
        next_[0] = memory_.get(), next_[1] = memory_.get() + (1 << 19);
        ggml_context * c = ctx_.get();

        embd   = place(ggml_new_tensor_2d(c, GGML_TYPE_F32, kWidth, 1));
        pos    = place(ggml_new_tensor_1d(c, GGML_TYPE_I32, 1));
        k_idx  = place(ggml_new_tensor_1d(c, GGML_TYPE_I64, 1));
        v_idx  = place(ggml_new_tensor_1d(c, GGML_TYPE_I64, 1));
        mask   = place(ggml_new_tensor_4d(c, GGML_TYPE_F16, n_kv, 1, 1, 1));
        out_id = place(ggml_new_tensor_1d(c, GGML_TYPE_I32, 1));
        for (ggml_tensor *& cache : caches) {
            cache = place(ggml_new_tensor_2d(c, type, kWidth, n_cell_ * (second_stream ? 2 : 1)), true);
        }
        ggml_tensor * weight = place(ggml_new_tensor_1d(c, GGML_TYPE_F32, kWidth), true);
        ggml_tensor * x      = node(ggml_mul(c, embd, weight));
        ggml_tensor * q      = node(ggml_rope(c, ggml_reshape_3d(c, x, kWidth, 1, 1), pos, kWidth, 0));
        graph                = ggml_new_graph(c);
        ggml_build_forward_expand(graph, node(ggml_set_rows(c, caches[0], x, k_idx), caches[0]));
        ggml_build_forward_expand(graph, node(ggml_set_rows(c, caches[1], x, v_idx), caches[1]));
        const auto view = [&](ggml_tensor * cache) {
            ggml_tensor * v =
                ggml_view_3d(c, cache, kWidth, n_kv, 1, cache->nb[1], cache->nb[1] * n_cell_, cache->nb[1] * first_);
            v->buffer = cache->buffer, v->data = static_cast<uint8_t *>(cache->data) + v->view_offs;
            return v;
        };
        ggml_tensor * out = node(ggml_flash_attn_ext(c, q, view(caches[0]), view(caches[1]), mask, 1.0f, 0.0f, 0.0f));
        extra             = out;
        ggml_build_forward_expand(graph, node(ggml_get_rows(c, ggml_reshape_2d(c, out, kWidth, 1), out_id)));
        make_table(table_type);
        const Bytes noise = noise_of(rng, 1 << 19);
        upload(memory_.get() + (1 << 19), noise.data(), noise.size());
    }

    bool arm(HeadStart & head) { return head.arm(graph, stream(), first_, n_kv_, totals_.get()); }

    // A node that writes where the graph's memory is not.
    void add_copy() {
        ggml_tensor * copy = ggml_cpy(ctx_.get(), extra, ggml_view_1d(ctx_.get(), caches[0], kWidth, 0));
        copy->buffer       = caches[0]->buffer;
        ggml_build_forward_expand(graph, copy);
    }

    std::vector<std::pair<ggml_tensor *, Bytes>> list(const Inputs & in) {
        std::vector<std::pair<ggml_tensor *, Bytes>> all;
        all.emplace_back(embd, embedded(in.token));
        all.emplace_back(pos, bytes_of(std::vector<int32_t>{in.pos}));
        all.emplace_back(k_idx, bytes_of(std::vector<int64_t>{in.cell}));
        all.emplace_back(v_idx, bytes_of(std::vector<int64_t>{in.v_cell}));
        all.emplace_back(mask, bytes_of(in.mask));
        all.emplace_back(out_id, bytes_of(std::vector<int32_t>{in.out_id}));
        return all;
    }

    Embedding embedding(const int32_t * token) const {
        return {token, rows_.data(), kTokens, static_cast<int64_t>(ggml_row_size(type_, kWidth)), kWidth, type_, host};
    }

    // ggml's own GET_ROWS on the CPU.
    Bytes embedded(int32_t token) {
        ggml_context_ptr c(ggml_init({1 << 20, nullptr, false}));
        ggml_tensor *    table  = ggml_new_tensor_2d(c.get(), type_, kWidth, kTokens);
        ggml_tensor *    tokens = ggml_new_tensor_1d(c.get(), GGML_TYPE_I32, 1);
        std::memcpy(table->data, rows_.data(), rows_.size());
        std::memcpy(tokens->data, &token, sizeof(token));
        ggml_tensor * row = ggml_get_rows(c.get(), table, tokens);
        ggml_cgraph * g   = ggml_new_graph(c.get());
        ggml_build_forward_expand(g, row);
        ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        CHECK_EQUAL(ggml_backend_graph_compute(cpu.get(), g), GGML_STATUS_SUCCESS);
        Bytes out(kWidth * sizeof(float));
        std::memcpy(out.data(), row->data, out.size());
        return out;
    }

    Bytes lasting() const { return download(memory_.get() + (1 << 19), 1 << 19); }
    Bytes totals() const { return download(totals_.get(), 32); }

    // What a run leaves: other rows of the caches, other counters; inputs' memory is used for something else.
    void run(std::mt19937 & rng, int64_t cell) {
        for (ggml_tensor * cache : caches) {
            const Bytes row = noise_of(rng, cache->nb[1]);
            upload(static_cast<uint8_t *>(cache->data) + (first_ + cell) * cache->nb[1], row.data(), row.size());
        }
        const Bytes counted = noise_of(rng, 32), used = noise_of(rng, 1 << 19);
        upload(totals_.get(), counted.data(), counted.size());
        upload(memory_.get(), used.data(), used.size());
    }

    int64_t n_kv() const { return n_kv_; }
    int64_t first() const { return first_; }

    ggml_tensor * caches[2], *embd, *pos, *k_idx, *v_idx, *mask, *out_id, *extra;
    ggml_cgraph * graph;
    float         host[kWidth]; // where the CPU's GET_ROWS leaves the row

  private:
    static Bytes noise_of(std::mt19937 & rng, size_t n) {
        Bytes out(n);
        for (uint8_t & x : out) {
            x = static_cast<uint8_t>(rng());
        }
        return out;
    }

    ggml_tensor * place(ggml_tensor * t, bool lasts = false) {
        t->buffer = (lasts ? lasting_ : scratch_).get();
        t->data   = next_[lasts];
        next_[lasts] += (ggml_nbytes(t) + 63) / 64 * 64;
        return t;
    }

    ggml_tensor * node(ggml_tensor * t, ggml_tensor * into = nullptr) {
        if (into == nullptr) {
            return place(t);
        }
        t->buffer = into->buffer, t->data = into->data;
        return t;
    }

    void make_table(ggml_type type) {
        type_ = type;
        rows_.resize(ggml_row_size(type, kWidth) * kTokens);
        if (type == GGML_TYPE_F32) {
            std::memcpy(rows_.data(), table_.data(), rows_.size());
        } else {
            ggml_quantize_chunk(type, table_.data(), rows_.data(), 0, kTokens, kWidth, nullptr);
        }
    }

    int64_t                 n_kv_, n_cell_, first_;
    ggml_context_ptr        ctx_;
    Memory<uint8_t>         memory_;
    Memory<int64_t>         totals_;
    std::vector<float>      table_;
    ggml_type               type_ = GGML_TYPE_F32;
    Bytes                   rows_;
    ggml_backend_buffer_ptr scratch_, lasting_;
    uint8_t *               next_[2];
};

// What llama.cpp and the decoder do with a token.
class Player {
  public:
    Player(std::mt19937 & rng, Model & model) : rng_(rng), model_(model) { CHECK(model.arm(head)); }

    // launches: whether the decoder would, once it may; complete: whether all inputs come. Returns whether the token
    // was begun early and had what it needed.
    bool token(const Inputs & in, bool launches = true, bool complete = true) {
        const Bytes lasting = model_.lasting(), totals = model_.totals();
        begun = head.foretell(model_.embedding(&in.token)) && launches;
        if (begun) {
            CHECK(!is_busy && in.cell == in.v_cell);
            CHECK(head.begin());
            const int64_t cell = head.cell();
            CHECK(cell >= 0 && cell < model_.n_kv());
            told_.clear();
            for (const auto & given : model_.list(in)) { // as the graph reads them, before it uses the memory
                told_.push_back(download(given.first->data, given.second.size()));
            }
            model_.run(rng_, cell);
        }
        const auto all = model_.list(in);
        for (size_t i = 0; i < all.size() - (complete ? 0 : 1); ++i) {
            set(all[i].first, all[i].second);
        }
        const bool arrived = head.arrive();
        CHECK(!arrived || head.is_under_way());
        if (arrived) {
            for (size_t i = 0; i < all.size(); ++i) {
                CHECK(told_[i] == all[i].second);
            }
            head.end();
            return true;
        }
        undo();
        CHECK(lasting == model_.lasting() && totals == model_.totals());
        for (size_t i = 0; i < all.size() - (complete ? 0 : 1); ++i) {
            CHECK(download(all[i].first->data, all[i].second.size()) == all[i].second);
        }
        return false;
    }

    HeadStart head;
    bool      begun    = false;
    int       n_undone = 0;

  private:
    void set(ggml_tensor * t, const Bytes & bytes) {
        const void * data = bytes.data();
        if (t == model_.embd) {
            std::memcpy(model_.host, bytes.data(), bytes.size());
            data = model_.host;
        }
        HeadStart::Input input = head.input(t, data, 0, bytes.size());
        if (input == HeadStart::Input::differs) {
            undo();
            input = head.input(t, data, 0, bytes.size());
        }
        CHECK(input == HeadStart::Input::copy || (input == HeadStart::Input::there && head.is_under_way()));
        if (input == HeadStart::Input::copy) {
            upload(t->data, bytes.data(), bytes.size());
        }
    }

    void undo() {
        if (head.is_under_way()) {
            ++n_undone;
            CHECK(head.undo());
            CHECK(!head.is_under_way());
        }
    }

    std::mt19937 &     rng_;
    Model &            model_;
    std::vector<Bytes> told_;
};

Inputs first_inputs(std::mt19937 & rng, const Model & model, int64_t cell) {
    Inputs in;
    in.token = static_cast<int32_t>(rng() % kTokens);
    in.pos   = static_cast<int32_t>(rng() % 1000);
    in.cell = in.v_cell = model.first() + cell;
    in.mask.assign(model.n_kv(), 0xfc00);
    for (int64_t c = 0; c <= cell; ++c) {
        in.mask[c] = rng() % 8 != 0 || c == cell ? 0 : 0xfc00;
    }
    return in;
}

void next(std::mt19937 & rng, const Model & model, Inputs & in) {
    in.token = static_cast<int32_t>(rng() % kTokens);
    ++in.pos;
    ++in.cell, ++in.v_cell;
    in.mask[in.cell - model.first()] = 0;
}

} // namespace

TEST(transfers_copy_pieces_of_any_size_and_place_there_and_back) {
    std::mt19937          rng    = fresh_rng();
    constexpr int64_t     kBytes = 1 << 17;
    Copied<uint8_t>       from, to;
    std::vector<Transfer> pieces;
    for (Copied<uint8_t> * memory : {&from, &to}) {
        for (int64_t i = 0; i < kBytes; ++i) {
            memory->host.push_back(static_cast<uint8_t>(rng()));
        }
        memory->to_device();
    }
    const int64_t cell        = 5;
    Bytes         wanted_from = from.host, wanted_to = to.host;
    int64_t       at = 0;
    for (const int64_t bytes : {4, 16, 34, 1025, 4096, 40000}) {
        for (const int64_t shift : {0, 2}) {
            const int64_t step = bytes < 100 ? 64 : 0;
            const int32_t hole = bytes > 100 ? static_cast<int32_t>(shift + 2) : 0;
            at                 = (at + 15) / 16 * 16 + shift;
            pieces.push_back({from.device.get() + at, to.device.get() + at, bytes, step, step / 2, hole});
            for (int32_t i = 0; i < hole; ++i) {
                wanted_from[at + cell * hole + i] = 0;
            }
            std::copy_n(wanted_from.begin() + at + cell * step, bytes, wanted_to.begin() + at + cell * step / 2);
            at += cell * step + bytes;
        }
    }
    CHECK(at < kBytes);
    Copied<Transfer> table;
    table.host = pieces;
    table.to_device();
    const auto n = static_cast<int32_t>(pieces.size());
    CHECK_EQUAL(cuda_api()->transfer(cuda_stream()->device(), table.device.get(), n, cell, 0), 0);
    from.to_host(), to.to_host();
    CHECK(from.host == wanted_from);
    CHECK(to.host == wanted_to);
    const Bytes noise(kBytes, 0x5a);
    upload(from.device.get(), noise.data(), noise.size());
    CHECK_EQUAL(cuda_api()->transfer(cuda_stream()->device(), table.device.get(), 6, cell, 1), 0); // without holes
    const Bytes back = download(from.device.get(), kBytes);
    for (size_t i = 0; i < 6; ++i) {
        const int64_t first = pieces[i].from - from.device.get();
        for (int64_t b = 0; b < pieces[i].bytes; ++b) {
            CHECK_EQUAL(back[first + cell * pieces[i].from_step + b],
                        wanted_from[first + cell * pieces[i].from_step + b]);
        }
    }
}

TEST(tokens_begin_early_once_the_last_ones_were_foretold) {
    std::mt19937 rng = fresh_rng();
    for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        for (const ggml_type table : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0}) {
            const Case c(std::string(ggml_type_name(type)) + ", table " + ggml_type_name(table));
            Model      model(rng, type, table, 256, rng() % 2 == 0);
            Player     player(rng, model);
            Inputs     in = first_inputs(rng, model, 100);
            for (int i = 0; i < 8; ++i) {
                CHECK_EQUAL(player.token(in), i >= 3); // the first tells, two were foretold
                next(rng, model, in);
            }
            CHECK_EQUAL(player.n_undone, 0);
        }
    }
}

TEST(a_wrong_guess_leaves_no_trace_and_makes_wary) {
    std::mt19937 rng = fresh_rng();
    Model        model(rng, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, 512, true);
    Player       player(rng, model);
    Inputs       in = first_inputs(rng, model, 20);
    const auto   go = [&](int n) {
        int begun = 0;
        for (int i = 0; i < n; ++i) {
            next(rng, model, in);
            begun += player.token(in) ? 1 : 0;
        }
        return begun;
    };
    CHECK_EQUAL(go(6), 3);
    for (int needed = 4; needed <= 16; needed *= 2) {
        in.pos += 3;
        CHECK_EQUAL(go(1), 0);
        CHECK_EQUAL(go(needed + 1), 1);
    }
    CHECK_EQUAL(player.n_undone, 3);
    CHECK_EQUAL(go(20), 20);
    in.cell += 2, in.v_cell += 2; // many were right: it trusts again
    CHECK_EQUAL(go(1), 0);
    CHECK_EQUAL(go(3), 1);
    CHECK_EQUAL(player.n_undone, 4);
}

TEST(whatever_llama_cpp_sets_is_what_the_graph_gets) {
    std::mt19937 rng   = fresh_rng();
    int          right = 0, undone = 0;
    for (int round = 0; round < 6; ++round) {
        Model  model(rng, round % 2 == 0 ? GGML_TYPE_F16 : GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, 256, rng() % 2 == 0);
        Player player(rng, model);
        Inputs in   = first_inputs(rng, model, 10);
        int    calm = 0;
        for (int i = 0; i < 120; ++i) {
            next(rng, model, in);
            bool launches = true, complete = true;
            if (calm-- <= 0) {
                switch (rng() % 10) {
                    case 0: in.pos = static_cast<int32_t>(rng() % 500); break;
                    case 1: in.cell = in.v_cell = model.first() + static_cast<int64_t>(rng() % 200); break;
                    case 2: in.mask[rng() % 256] ^= 0xfc00; break;
                    case 3: in = first_inputs(rng, model, static_cast<int64_t>(rng() % 100)); break;
                    case 4: in.out_id = 1 - in.out_id; break;
                    case 5: complete = false; break;
                    case 6: is_busy = true; break;
                    case 7: CHECK(model.arm(player.head)); break;
                    default: break;
                }
                calm = static_cast<int>(rng() % 12);
            }
            launches = rng() % 5 != 0;
            if (in.cell - model.first() >= 250) {
                in = first_inputs(rng, model, 10);
            }
            right += player.token(in, launches, complete) ? 1 : 0;
            is_busy = false;
        }
        undone += player.n_undone;
    }
    CHECK(right > 20);
    CHECK(undone > 3);
}

TEST(graphs_that_could_not_be_undone_are_refused) {
    std::mt19937 rng = fresh_rng();
    Model        model(rng, GGML_TYPE_F16, GGML_TYPE_F16, 256, false);
    HeadStart    head;
    CHECK(model.arm(head));
    model.add_copy();
    CHECK(!model.arm(head));
    const int32_t token = 3;
    CHECK(!head.foretell(model.embedding(&token)));
    CHECK(head.input(model.mask, model.host, 0, 512) == HeadStart::Input::unknown);
}

// K's row and V's are kept by one number.
TEST(rows_of_k_and_v_that_differ_are_left_alone) {
    std::mt19937 rng = fresh_rng();
    Model        model(rng, GGML_TYPE_F16, GGML_TYPE_F16, 256, false);
    Player       player(rng, model);
    Inputs       in = first_inputs(rng, model, 20);
    in.v_cell       = in.cell + 1;
    for (int i = 0; i < 8; ++i) {
        next(rng, model, in);
        in.mask[in.v_cell] = 0;
        CHECK(!player.token(in));
        CHECK(!player.begun);
    }
}

TEST(a_token_out_of_the_table_is_not_looked_up) {
    std::mt19937 rng = fresh_rng();
    Model        model(rng, GGML_TYPE_F16, GGML_TYPE_F16, 256, false);
    Player       player(rng, model);
    Inputs       in = first_inputs(rng, model, 20);
    for (int i = 0; i < 5; ++i) {
        next(rng, model, in);
        player.token(in);
    }
    CHECK(player.begun);
    for (const int32_t token : {-1, static_cast<int32_t>(kTokens), INT32_MAX}) {
        CHECK(!player.head.foretell(model.embedding(&token)));
    }
}
