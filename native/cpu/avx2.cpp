// The stages for AVX2, FMA and F16C; compiled with exactly these.
#include <immintrin.h>

#include "common.h"

namespace fasa {
namespace {

// For each mask of 8 lanes, the lanes that are set, in order.
struct Front {
    uint8_t lane[256][8];
    constexpr Front() : lane() {
        for (int mask = 0; mask < 256; ++mask) {
            int n = 0;
            for (int i = 0; i < 8; ++i) {
                if ((mask >> i & 1) != 0) {
                    lane[mask][n++] = static_cast<uint8_t>(i);
                }
            }
        }
    }
};
constexpr Front kFront;

#include "codes_x86.h"

struct V : Codes256 {
    static constexpr int      W        = 8;
    static constexpr int      kQueries = 2; // they share the unpacking of codes
    static constexpr uint32_t kLanes   = 0xff;

    using F     = __m256;
    using Bytes = __m256i;
    using Acc   = __m256i; // int16, two per cell

    static F    set(float a) { return _mm256_set1_ps(a); }
    static F    load(const float * p) { return _mm256_loadu_ps(p); }
    static void store(float * p, F a) { _mm256_storeu_ps(p, a); }
    static F    add(F a, F b) { return _mm256_add_ps(a, b); }
    static F    sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F    mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F    fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F    fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
    static F    max(F a, F b) { return _mm256_max_ps(a, b); }
    static F    exp(F a) {
        const F n = _mm256_round_ps(mul(a, set(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const F r = _mm256_fnmadd_ps(n, set(kLn2Low), _mm256_fnmadd_ps(n, set(kLn2High), a));
        F       p = set(kExpTerms[0]);
        for (int i = 1; i < 7; ++i) {
            p = fma(p, r, set(kExpTerms[i]));
        }
        const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return _mm256_andnot_ps(_mm256_cmp_ps(a, set(kExpMin), _CMP_LT_OQ), mul(p, _mm256_castsi256_ps(power)));
    }

    static float half(const void * p) {
        uint16_t h;
        std::memcpy(&h, p, sizeof(h));
        return _cvtsh_ss(h);
    }
    static F load_f16(const uint8_t * p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static F load_steps(const uint8_t * p) {
        const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_slli_epi32(codes, 19), _mm256_set1_epi32(static_cast<int>(kStepOffset))));
    }
    static F load_f32(const uint8_t * p) { return _mm256_loadu_ps(reinterpret_cast<const float *>(p)); }
    static F load_bf16(const uint8_t * p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static F widen(Codes c, int i) {
        const __m128i half = i < 2 ? _mm256_castsi256_si128(c) : _mm256_extracti128_si256(c, 1);
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(i % 2 == 0 ? half : _mm_srli_si128(half, 8)));
    }
    static F load_i8(const uint8_t * p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
    }
    static float sum(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s        = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static uint32_t at_least(F a, F b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
    }
    static F keep(uint32_t bits, F a, float other) {
        const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i on   = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
        return _mm256_blendv_ps(set(other), a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, lane)));
    }
    using Count = __m256i;
    static Count count_zero() { return _mm256_setzero_si256(); }
    static Count count_add(Count c, F x, F t) { // a true lane is -1
        return _mm256_sub_epi32(c, _mm256_castps_si256(_mm256_cmp_ps(x, t, _CMP_GE_OQ)));
    }
    static int64_t count_sum(Count c) {
        alignas(32) int32_t lanes[W];
        _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), c);
        int64_t sum = 0;
        for (const int32_t lane : lanes) {
            sum += lane;
        }
        return sum;
    }
    static void store_peaks(float * p, F a) { store(p, a); }

    // Products of a pair stay below 2 * 127, 2 * 3 * 127, 2 * 15 * 127, 2 * 255 * 64: this many fit into int16.
    static int   max_macs(int bits) { return bits == 1 ? 129 : bits == 2 ? 43 : bits == 4 ? 8 : 1; }
    static Acc   acc_zero() { return _mm256_setzero_si256(); }
    static Bytes load_bytes(const uint8_t * p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static Bytes field(Bytes a, int shift, int mask) {
        return _mm256_and_si256(_mm256_srli_epi16(a, shift), _mm256_set1_epi8(static_cast<char>(mask)));
    }
    static Bytes quad(const int8_t * p) {
        int32_t q;
        std::memcpy(&q, p, sizeof(q));
        return _mm256_set1_epi32(q);
    }
    static Acc mac(Acc acc, Bytes u, Bytes q) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, q)); }
    static F   total(Acc a) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(a, _mm256_set1_epi16(1))); }

    static bool reached(const float * peaks, float t) { return at_least(load(peaks), set(t)) != 0; }

    // The permutation that moves lanes whose bits are set to the front: a branch per cell would be mispredicted.
    static __m256i front(uint32_t bits) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kFront.lane[bits])));
    }
    static int64_t collect(const float * x, int32_t first, float t, int64_t kept, float * values, int32_t * cells) {
        for (int32_t i = 0; i < FASA_BLOCK_CELLS; i += W) {
            const F        v    = load(x + i);
            const uint32_t bits = at_least(v, set(t));
            const __m256i  lane = front(bits);
            store(values + kept, _mm256_permutevar8x32_ps(v, lane));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(cells + kept),
                                _mm256_add_epi32(lane, _mm256_set1_epi32(first + i)));
            kept += __builtin_popcount(bits);
        }
        return kept;
    }
    static int64_t pack(const int32_t * from, uint32_t bits, int64_t kept, int32_t * cells) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(cells + kept), _mm256_permutevar8x32_epi32(v, front(bits)));
        return kept + __builtin_popcount(bits);
    }
};

#include "prefetch.inl"
#include "rows.inl"

#include "attend.inl"
#include "score.inl"
#include "select.inl"

} // namespace

const Kernels kAvx2 = {score, select, attend};

} // namespace fasa
