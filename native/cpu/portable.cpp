// The stages for any CPU, over the vector types of GCC and Clang: they become whatever the build's baseline has, SSE2
// on x86-64 and NEON on AArch64.
#include "common.h"

namespace fasa {
namespace {

struct V {
    static constexpr int      W        = 8;
    static constexpr int      kQueries = 2;
    static constexpr uint32_t kLanes   = 0xff;

    // Vectors of GCC and Clang: operators work lane by lane, on two or more registers where one is too small.
    typedef float    F __attribute__((vector_size(32)));
    typedef uint16_t Bytes __attribute__((vector_size(32))); // two code bytes per lane
    typedef int16_t  Acc __attribute__((vector_size(32)));   // two sums per cell

    template <typename G> static F each(G && g) {
        F r;
        for (int i = 0; i < W; ++i) {
            r[i] = g(i);
        }
        return r;
    }

    static F set(float a) { return F{} + a; }
    static F load(const float * p) {
        F r;
        std::memcpy(&r, p, sizeof(r));
        return r;
    }
    static void store(float * p, const F & a) { std::memcpy(p, &a, sizeof(a)); }
    static F    add(const F & a, const F & b) { return a + b; }
    static F    sub(const F & a, const F & b) { return a - b; }
    static F    mul(const F & a, const F & b) { return a * b; }
    static F    fma(const F & a, const F & b, const F & c) { return a * b + c; }
    static F    fms(const F & a, const F & b, const F & c) { return a * b - c; }
    static F    max(const F & a, const F & b) { return a > b ? a : b; }
    static F    exp(const F & a) {
        return each([&](int i) { return a[i] < kExpMin ? 0.0f : std::exp(a[i]); });
    }

    static float half(const void * p) {
        uint16_t h;
        std::memcpy(&h, p, sizeof(h));
        return half_to_float(h);
    }
    static F load_f16(const uint8_t * p) {
        return each([=](int i) { return half(p + 2 * i); });
    }
    static F load_steps(const uint8_t * p) {
        typedef uint8_t  Bytes8 __attribute__((vector_size(8)));
        typedef uint32_t Words __attribute__((vector_size(32)));
        Bytes8           codes;
        std::memcpy(&codes, p, sizeof(codes));
        return reinterpret_cast<F>((__builtin_convertvector(codes, Words) << 19) + kStepOffset);
    }
    static F load_f32(const uint8_t * p) {
        F r;
        std::memcpy(&r, p, sizeof(r));
        return r;
    }
    static F load_bf16(const uint8_t * p) {
        typedef uint16_t Halves __attribute__((vector_size(16)));
        typedef uint32_t Words __attribute__((vector_size(32)));
        Halves           bits;
        std::memcpy(&bits, p, sizeof(bits));
        return reinterpret_cast<F>(__builtin_convertvector(bits, Words) << 16);
    }

    // 32 small integers; loops that the compiler turns into vectors.
    struct Codes {
        int8_t c[32];
    };
    static Codes nibbles(const uint8_t * p) {
        Codes r;
        for (int i = 0; i < 16; ++i) {
            r.c[i]      = static_cast<int8_t>(p[i] & 15);
            r.c[i + 16] = static_cast<int8_t>(p[i] >> 4);
        }
        return r;
    }
    static Codes minus(Codes r, int n) {
        for (int8_t & code : r.c) {
            code = static_cast<int8_t>(code - n);
        }
        return r;
    }
    static Codes fifth_bits(Codes r, const uint8_t * word) {
        uint32_t bits;
        std::memcpy(&bits, word, sizeof(bits));
        for (int i = 0; i < 32; ++i) {
            r.c[i] = static_cast<int8_t>(r.c[i] | (bits >> i & 1u) << 4);
        }
        return r;
    }
    static Codes lookup(Codes r, const int8_t * table) {
        for (int8_t & code : r.c) {
            code = table[code];
        }
        return r;
    }
    static F widen(const Codes & r, int i) { return load_i8(reinterpret_cast<const uint8_t *>(r.c) + W * i); }

    static F load_i8(const uint8_t * p) {
        typedef int8_t Bytes8 __attribute__((vector_size(8)));
        Bytes8         codes;
        std::memcpy(&codes, p, sizeof(codes));
        return __builtin_convertvector(codes, F);
    }
    static float    sum(const F & a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
    static uint32_t at_least(const F & a, const F & b) {
        uint32_t bits = 0;
        for (int i = 0; i < W; ++i) {
            bits |= static_cast<uint32_t>(a[i] >= b[i]) << i;
        }
        return bits;
    }
    static F keep(uint32_t bits, const F & a, float other) {
        return each([&](int i) { return (bits >> i & 1u) != 0 ? a[i] : other; });
    }
    using Count = int64_t;
    static Count count_zero() { return 0; }
    static Count count_add(Count c, const F & x, const F & t) {
        for (int i = 0; i < W; ++i) {
            c += x[i] >= t[i] ? 1 : 0;
        }
        return c;
    }
    static int64_t count_sum(Count c) { return c; }
    static void    store_peaks(float * p, const F & a) { store(p, a); }

    // As many products as stay inside int16; see avx2.cpp.
    static int   max_macs(int bits) { return bits == 1 ? 129 : bits == 2 ? 43 : bits == 4 ? 8 : 1; }
    static Acc   acc_zero() { return Acc{}; }
    static Bytes load_bytes(const uint8_t * p) {
        Bytes r;
        std::memcpy(&r, p, sizeof(r));
        return r;
    }
    static Bytes field(const Bytes & a, int shift, int mask) {
        return a >> static_cast<uint16_t>(shift) & static_cast<uint16_t>(mask * 0x101);
    }
    static Bytes quad(const int8_t * p) {
        uint32_t four;
        std::memcpy(&four, p, sizeof(four));
        typedef uint32_t Words __attribute__((vector_size(32)));
        return reinterpret_cast<Bytes>(Words{} + four);
    }
    static Acc mac(Acc acc, const Bytes & u, const Bytes & q) {
        const Acc q_low  = reinterpret_cast<Acc>(q << 8) >> 8; // sign extended
        const Acc q_high = reinterpret_cast<Acc>(q) >> 8;
        return acc + reinterpret_cast<Acc>(u & 0xff) * q_low + reinterpret_cast<Acc>(u >> 8) * q_high;
    }
    static F total(const Acc & a) {
        typedef int32_t Words __attribute__((vector_size(32)));
        const Words     pairs = reinterpret_cast<Words>(a);
        return __builtin_convertvector((pairs << 16 >> 16) + (pairs >> 16), F);
    }

    static bool    reached(const float * peaks, float t) { return at_least(load(peaks), set(t)) != 0; }
    static int64_t collect(const float * x, int32_t first, float t, int64_t kept, float * values, int32_t * cells) {
        for (int32_t i = 0; i < FASA_BLOCK_CELLS; ++i) { // no branch: what is not kept is overwritten
            values[kept] = x[i];
            cells[kept]  = first + i;
            kept += x[i] >= t ? 1 : 0;
        }
        return kept;
    }
    static int64_t pack(const int32_t * from, uint32_t bits, int64_t kept, int32_t * cells) {
        for (int i = 0; i < W; ++i) {
            cells[kept] = from[i];
            kept += bits >> i & 1u;
        }
        return kept;
    }
};

#include "prefetch.inl"
#include "rows.inl"

#include "attend.inl"
#include "score.inl"
#include "select.inl"

} // namespace

const Kernels kPortable = {score, select, attend};

} // namespace fasa
