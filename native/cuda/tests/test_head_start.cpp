// The head start, played against a llama.cpp that sets the inputs of one token after the other: what it sets is what
// the graph finds, and what a wrong guess has overwritten comes back.
#include "one_layer.h"

using namespace fasa_test;

namespace {

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

} // namespace

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
