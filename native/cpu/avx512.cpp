// The stages for AVX-512 F, BW, DQ, VL and VNNI; compiled with exactly these.
#include <immintrin.h>

#include "common.h"

namespace fasa {
namespace {

#include "codes_x86.h"

struct V : Codes256 {
    static constexpr int      W        = 16;
    static constexpr int      kQueries = 4;
    static constexpr uint32_t kLanes   = 0xffff;

    using F     = __m512;
    using Bytes = __m512i;
    using Acc   = __m512i; // int32, one per cell

    static F    set(float a) { return _mm512_set1_ps(a); }
    static F    load(const float * p) { return _mm512_loadu_ps(p); }
    static void store(float * p, F a) { _mm512_storeu_ps(p, a); }
    static F    add(F a, F b) { return _mm512_add_ps(a, b); }
    static F    sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F    mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F    fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F    fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
    static F    max(F a, F b) { return _mm512_max_ps(a, b); }
    static F    exp(F a) {
        const F n = _mm512_roundscale_ps(mul(a, set(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const F r = _mm512_fnmadd_ps(n, set(kLn2Low), _mm512_fnmadd_ps(n, set(kLn2High), a));
        F       p = set(kExpTerms[0]);
        for (int i = 1; i < 7; ++i) {
            p = fma(p, r, set(kExpTerms[i]));
        }
        const __mmask16 tiny = _mm512_cmp_ps_mask(a, set(kExpMin), _CMP_LT_OQ);
        return _mm512_mask_blend_ps(tiny, _mm512_scalef_ps(p, n), _mm512_setzero_ps());
    }

    static float half(const void * p) {
        uint16_t h;
        std::memcpy(&h, p, sizeof(h));
        return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
    }
    static F load_f16(const uint8_t * p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static F load_steps(const uint8_t * p) {
        const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        return _mm512_castsi512_ps(
            _mm512_add_epi32(_mm512_slli_epi32(codes, 19), _mm512_set1_epi32(static_cast<int>(kStepOffset))));
    }
    static F load_f32(const uint8_t * p) { return _mm512_loadu_ps(p); }
    static F load_bf16(const uint8_t * p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static F widen(Codes c, int i) {
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(i == 0 ? _mm256_castsi256_si128(c) : _mm256_extracti128_si256(c, 1)));
    }
    static F load_i8(const uint8_t * p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
    }
    static float    sum(F a) { return _mm512_reduce_add_ps(a); }
    static uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static F        keep(uint32_t bits, F a, float other) {
        return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), set(other), a);
    }
    using Count = int64_t;
    static Count   count_zero() { return 0; }
    static Count   count_add(Count c, F x, F t) { return c + __builtin_popcount(at_least(x, t)); }
    static int64_t count_sum(Count c) { return c; }
    static void    store_peaks(float * p, F a) {
        _mm256_storeu_ps(p, _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
    }

    static int   max_macs(int) { return 1 << 20; }
    static Acc   acc_zero() { return _mm512_setzero_si512(); }
    static Bytes load_bytes(const uint8_t * p) { return _mm512_loadu_si512(p); }
    static Bytes field(Bytes a, int shift, int mask) {
        return _mm512_and_si512(_mm512_srli_epi16(a, static_cast<unsigned>(shift)),
                                _mm512_set1_epi8(static_cast<char>(mask)));
    }
    static Bytes quad(const int8_t * p) {
        int32_t q;
        std::memcpy(&q, p, sizeof(q));
        return _mm512_set1_epi32(q);
    }
    static Acc mac(Acc acc, Bytes u, Bytes q) { return _mm512_dpbusd_epi32(acc, u, q); }
    static F   total(Acc a) { return _mm512_cvtepi32_ps(a); }

    // Whether one of a block's peaks reaches t.
    static bool reached(const float * peaks, float t) {
        return _mm256_cmp_ps_mask(_mm256_loadu_ps(peaks), _mm256_set1_ps(t), _CMP_GE_OQ) != 0;
    }
    // Appends the cells of a block that reach t, and their scores.
    static int64_t collect(const float * x, int32_t first, float t, int64_t kept, float * values, int32_t * cells) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int32_t i = 0; i < FASA_BLOCK_CELLS; i += W) {
            // Compress in registers and store whole vectors: the compressing store is microcoded on some CPUs.
            const F         v    = load(x + i);
            const __mmask16 mask = _mm512_cmp_ps_mask(v, set(t), _CMP_GE_OQ);
            const __m512i   at   = _mm512_add_epi32(_mm512_set1_epi32(first + i), lane);
            store(values + kept, _mm512_maskz_compress_ps(mask, v));
            _mm512_storeu_si512(cells + kept, _mm512_maskz_compress_epi32(mask, at));
            kept += __builtin_popcount(mask);
        }
        return kept;
    }
    // Appends those of W cells whose bits are set; `cells` may be `from` or before it.
    static int64_t pack(const int32_t * from, uint32_t bits, int64_t kept, int32_t * cells) {
        const __m512i v = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), _mm512_loadu_si512(from));
        _mm512_storeu_si512(cells + kept, v);
        return kept + __builtin_popcount(bits);
    }
};

#include "prefetch.inl"
#include "rows.inl"

#include "attend.inl"
#include "score.inl"
#include "select.inl"

} // namespace

const Kernels kAvx512 = {score, select, attend};

} // namespace fasa
