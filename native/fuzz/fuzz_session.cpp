// libFuzzer on sessions: configurations and profiles of any values, in any order of calls.
#include "input.h"

using namespace fasa_fuzz;

namespace {

// A profile and exact arrays for it. Counts beyond what is allowed come with arrays that are too small, or none: they
// must be refused before the arrays are read.
struct HostileProfile {
    explicit HostileProfile(Input & in) {
        view.n_layer          = in.number<int32_t>(1, 4);
        view.n_head_kv        = in.number<int32_t>(1, 4);
        view.head_dim         = in.chance(4) ? in.number<int32_t>(1, 257) : 2 * static_cast<int32_t>(in.within(1, 128));
        view.n_rot            = in.chance(4) ? in.number<int32_t>(0, 257) : view.head_dim;
        view.rope             = in.chance(4) ? in.number<int32_t>(-1, 3) : FASA_ROPE_NEOX;
        view.n_ranked         = in.number<int32_t>(1, std::clamp(view.head_dim / 2, 1, 128));
        const int64_t n_head  = product(view.n_layer, view.n_head_kv);
        const int64_t n_chunk = product(n_head, view.n_ranked), n_channel = product(n_head, view.head_dim);
        const bool    hostile = in.chance(3);
        chunks.reset(new uint16_t[n_chunk]);
        bits.reset(new uint8_t[n_chunk]);
        for (int64_t i = 0; i < n_chunk; ++i) {
            chunks[i] = hostile && in.chance(16) ? in.raw<uint16_t>() : static_cast<uint16_t>(i % view.n_ranked);
            bits[i]   = in.chance(16) ? 0 : hostile && in.chance(16) ? in.raw<uint8_t>() : uint8_t(1 << i % 4);
        }
        center = in.reals(n_channel, hostile);
        scale  = in.reals(n_channel, hostile);
        for (int64_t i = 0; i < n_channel && !hostile; ++i) {
            scale[i] = std::fabs(scale[i]) + 0.05f;
        }
        view.chunks = in.chance(32) ? nullptr : chunks.get();
        view.bits   = in.chance(32) ? nullptr : bits.get();
        view.center = in.chance(2) ? nullptr : center.get();
        view.scale  = in.chance(2) ? nullptr : scale.get();
    }

    // Of counts that are allowed and small enough to be here; otherwise 0.
    static int64_t product(int64_t a, int64_t b) { return a > 0 && b > 0 && a * b < 100000 ? a * b : 0; }

    fasa_profile    view = {};
    Array<uint16_t> chunks;
    Array<uint8_t>  bits;
    Array<float>    center, scale;
};

// A count that is allowed but too large for a fuzzer's arrays would be a broken promise, not a hostile value.
bool promised(const fasa_profile & p) {
    const auto ok    = [](int64_t n, int64_t most) { return n >= 1 && n <= most; };
    const bool small = ok(p.n_layer, 64) && ok(p.n_head_kv, 64);
    return small || !ok(p.n_layer, 4096) || !ok(p.n_head_kv, 1024) || !ok(p.n_ranked, FASA_MAX_HEAD_DIM / 2) ||
           !ok(p.head_dim, FASA_MAX_HEAD_DIM);
}

fasa_config hostile_config(Input & in) {
    fasa_config c = {};
    c.enabled     = in.number<int32_t>(0, 1);
    c.budget      = in.number<int32_t>(1, 4096);
    c.n_fc        = in.number<int32_t>(0, 128);
    c.bits        = in.chance(2) ? 0 : in.number<int32_t>(1, 8);
    c.max_rows    = in.number<int32_t>(0, FASA_MAX_ROWS);
    c.n_threads   = in.number<int32_t>(0, 3);
    c.min_ctx     = in.number<int32_t>(0, 4096);
    c.sinks       = in.number<int32_t>(0, 8);
    c.recent      = in.number<int32_t>(0, 8);
    c.verify      = in.number<int32_t>(0, 1);
    c.capture     = in.number<int32_t>(0, 1);
    c.isa         = in.number<int32_t>(-1, FASA_ISA_COUNT - 1);
    return c;
}

struct FreeSession {
    void operator()(fasa_session * session) const { fasa_session_free(session); }
};

void one_call(Input & in, fasa_session * session) {
    switch (in.within(0, 9)) {
        case 0: {
            const fasa_config c  = hostile_config(in);
            const bool        ok = called(fasa_session_configure(session, &c));
            expect(!ok || called(fasa_config_check(&c)), "configure took what config_check refuses");
            break;
        }
        case 1: {
            const HostileProfile p(in);
            if (promised(p.view)) {
                called(fasa_session_set_profile(session, in.chance(8) ? nullptr : &p.view));
            }
            break;
        }
        case 2: {
            fasa_counters c;
            expect(called(fasa_session_counters(session, &c)) && c.graphs == 0, "counters of nothing");
            break;
        }
        case 3: {
            fasa_timings t;
            called(fasa_session_timings(session, &t));
            break;
        }
        case 4: {
            int32_t    head_dim, n_head;
            int64_t    n_rows;
            const auto layer = in.number<int32_t>(0, 4);
            expect(!called(fasa_session_captured(session, layer, &head_dim, &n_head, &n_rows, nullptr)),
                   "captured queries without a graph");
            break;
        }
        case 5: {
            float      key;
            int32_t    head_dim, n_head_kv;
            const auto layer = in.number<int32_t>(0, 4);
            const auto c0 = in.number<int64_t>(0, 64), c1 = in.number<int64_t>(0, 64);
            expect(!called(fasa_session_keys(session, layer, c0, c1, &head_dim, &n_head_kv, &key)),
                   "keys without a graph");
            break;
        }
        case 6: called(fasa_session_invalidate(session)); break;
        case 7: called(fasa_session_captured_clear(session)); break;
        case 8: called(in.chance(2) ? fasa_session_arm(session) : fasa_session_disarm(session)); break;
        default: called(fasa_session_reset(session)); break;
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    Input       in(data, size);
    fasa_config config = hostile_config(in);
    for (int32_t i = 0; i < 3; ++i) { // the words of any id
        const int32_t id = in.number<int32_t>(0, FASA_REASON_COUNT);
        expect(std::strlen(fasa_reason_name(id)) > 0 && std::strlen(fasa_reason_text(id)) > 0,
               "a reason without words");
        expect(std::strlen(fasa_isa_name(id)) > 0 && fasa_isa_usable(id) <= 1, "an isa without a name");
    }
    const HostileProfile profile(in);
    const bool           dense = in.chance(8);
    if (!dense && !promised(profile.view)) {
        return 0;
    }
    fasa_session * created = nullptr;
    const bool     fine    = called(fasa_config_check(&config));
    if (!called(fasa_session_create(dense ? nullptr : &profile.view, &config, &created))) {
        expect(created == nullptr, "a session in spite of a failure");
        return 0;
    }
    expect(fine, "create took what config_check refuses");
    const std::unique_ptr<fasa_session, FreeSession> session(created);
    while (in.left() > 0) {
        one_call(in, created);
    }
    return 0;
}
