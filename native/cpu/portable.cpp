// The stages for any CPU: the shared code over a vector of 8 floats that is a plain array. Compilers turn its loops
// into whatever vectors the build's baseline has.
#include "common.h"

namespace fasa {
namespace {

struct V {
    static constexpr int      W        = 8;
    static constexpr int      kQueries = 2;
    static constexpr uint32_t kLanes   = 0xff;

    struct F {
        float x[W];
    };
    struct Bytes {
        uint8_t x[4 * W];
    };
    struct Acc {
        int32_t x[W];
    };

    template <typename G> static F each(G && g) {
        F r;
        for (int i = 0; i < W; ++i) {
            r.x[i] = g(i);
        }
        return r;
    }

    static F set(float a) {
        return each([=](int) { return a; });
    }
    static F load(const float * p) {
        return each([=](int i) { return p[i]; });
    }
    static void store(float * p, const F & a) { std::memcpy(p, a.x, sizeof(a.x)); }
    static F    add(const F & a, const F & b) {
        return each([&](int i) { return a.x[i] + b.x[i]; });
    }
    static F sub(const F & a, const F & b) {
        return each([&](int i) { return a.x[i] - b.x[i]; });
    }
    static F mul(const F & a, const F & b) {
        return each([&](int i) { return a.x[i] * b.x[i]; });
    }
    static F fma(const F & a, const F & b, const F & c) {
        return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
    }
    static F fms(const F & a, const F & b, const F & c) {
        return each([&](int i) { return a.x[i] * b.x[i] - c.x[i]; });
    }
    static F max(const F & a, const F & b) {
        return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
    }
    static F exp(const F & a) {
        return each([&](int i) { return a.x[i] < kExpMin ? 0.0f : std::exp(a.x[i]); });
    }

    static float half(const void * p) {
        uint16_t h;
        std::memcpy(&h, p, sizeof(h));
        return half_to_float(h);
    }
    static F load_f16(const uint8_t * p) {
        return each([=](int i) { return half(p + 2 * i); });
    }
    static F load_i8(const uint8_t * p) {
        return each([=](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
    }
    static float sum(const F & a) {
        return ((a.x[0] + a.x[4]) + (a.x[2] + a.x[6])) + ((a.x[1] + a.x[5]) + (a.x[3] + a.x[7]));
    }
    static uint32_t at_least(const F & a, const F & b) {
        uint32_t bits = 0;
        for (int i = 0; i < W; ++i) {
            bits |= static_cast<uint32_t>(a.x[i] >= b.x[i]) << i;
        }
        return bits;
    }
    static F keep(uint32_t bits, const F & a, float other) {
        return each([&](int i) { return (bits >> i & 1u) != 0 ? a.x[i] : other; });
    }
    using Count = int64_t;
    static Count count_zero() { return 0; }
    static Count count_add(Count c, const F & x, const F & t) {
        for (int i = 0; i < W; ++i) {
            c += x.x[i] >= t.x[i] ? 1 : 0;
        }
        return c;
    }
    static int64_t count_sum(Count c) { return c; }
    static void    store_peaks(float * p, const F & a) { store(p, a); }

    static int   max_macs(int) { return 1 << 20; }
    static Acc   acc_zero() { return {}; }
    static Bytes load_bytes(const uint8_t * p) {
        Bytes r;
        std::memcpy(r.x, p, sizeof(r.x));
        return r;
    }
    static Bytes field(const Bytes & a, int shift, int mask) {
        Bytes r;
        for (int i = 0; i < 4 * W; ++i) {
            r.x[i] = static_cast<uint8_t>(a.x[i] >> shift & mask);
        }
        return r;
    }
    static Bytes quad(const int8_t * p) {
        Bytes r;
        for (int i = 0; i < 4 * W; ++i) {
            r.x[i] = static_cast<uint8_t>(p[i % 4]);
        }
        return r;
    }
    static Acc mac(Acc acc, const Bytes & u, const Bytes & q) {
        for (int i = 0; i < 4 * W; ++i) {
            acc.x[i / 4] += u.x[i] * static_cast<int8_t>(q.x[i]);
        }
        return acc;
    }
    static F total(const Acc & a) {
        return each([&](int i) { return static_cast<float>(a.x[i]); });
    }

    static int64_t collect(const float * x, int32_t first, float t, int64_t kept, float * values, int32_t * cells) {
        for (int32_t i = 0; i < FASA_BLOCK_CELLS; ++i) { // no branch: what is not kept is overwritten
            values[kept] = x[i];
            cells[kept]  = first + i;
            kept += x[i] >= t ? 1 : 0;
        }
        return kept;
    }
};

#include "attend.inl"
#include "score.inl"
#include "select.inl"

} // namespace

const Kernels kPortable = {score, select, attend};

} // namespace fasa
