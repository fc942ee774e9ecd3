// Every instruction set against the reference kernels, on poisoned outputs of exactly the documented size: a sanitizer
// build then sees each byte read or written beyond.
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

#include "fasa.h"
#include "half.h"
#include "harness.h"
#include "layout.h"

using namespace fasa_test;

namespace {

constexpr float kNan    = std::numeric_limits<float>::quiet_NaN();
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Of kernels with double and with float sums; a query in 128 steps of a peak of 3.5 deviations gives 6e-5, in 65 steps
// 2.5e-4, both doubled here.
constexpr double kMaxScoreNmse  = 5e-4;
constexpr double kMaxAttendNmse = 1e-9;

struct FreeLayout {
    void operator()(fasa_layout * layout) const { fasa_layout_free(layout); }
};
using LayoutPtr = std::unique_ptr<fasa_layout, FreeLayout>;

LayoutPtr make_layout(std::mt19937 & rng, int32_t head_dim, int32_t n_rot, int32_t rope, int32_t n_fc, int32_t bits) {
    std::vector<uint16_t> fc(head_dim / 2);
    std::iota(fc.begin(), fc.end(), 0);
    std::shuffle(fc.begin(), fc.end(), rng);
    std::vector<uint8_t> widths(n_fc);
    for (uint8_t & w : widths) {
        w = static_cast<uint8_t>(bits != 0 ? bits : 1 << rng() % 4);
    }
    fasa_layout * layout = nullptr;
    CHECK_EQUAL(fasa_layout_create(head_dim, n_rot, rope, n_fc, fc.data(), widths.data(), nullptr, nullptr, &layout),
                FASA_STATUS_OK);
    return LayoutPtr(layout);
}

struct Scored {
    std::vector<float> scores, peaks;
};

Scored run_score(int32_t isa, const fasa_layout * layout, const std::vector<float> & q, int32_t n_q,
                 const std::vector<uint8_t> & index, const std::vector<uint64_t> & visible) {
    const int64_t n_block = static_cast<int64_t>(visible.size());
    Scored        s{std::vector<float>(64 * n_block * n_q, kNan), std::vector<float>(8 * n_block * n_q, kNan)};
    CHECK_EQUAL(fasa_score(isa, layout, q.data(), n_q, index.data(), visible.data(), n_block, 0, n_block,
                           s.scores.data(), s.peaks.data()),
                FASA_STATUS_OK);
    return s;
}

struct HeadShape {
    int32_t head_dim, n_rot, rope, n_fc, bits;
};

const HeadShape kHeads[] = {
    {128, 128, FASA_ROPE_NORM, 16, 4},  {128, 64, FASA_ROPE_NEOX, 17, 0}, {64, 64, FASA_ROPE_NEOX, 11, 2},
    {96, 96, FASA_ROPE_NORM, 7, 8},     {80, 40, FASA_ROPE_NEOX, 13, 0},  {256, 256, FASA_ROPE_NEOX, 128, 0},
    {256, 128, FASA_ROPE_NORM, 128, 2}, {32, 32, FASA_ROPE_NORM, 16, 8},  {64, 64, FASA_ROPE_NEOX, 21, 1},
};

} // namespace

TEST(score_agrees_with_the_reference) {
    std::mt19937 rng = fresh_rng();
    for (const HeadShape & h : kHeads) {
        const LayoutPtr layout  = make_layout(rng, h.head_dim, h.n_rot, h.rope, h.n_fc, h.bits);
        const int64_t   n_block = 3;

        std::vector<uint8_t> index(n_block * fasa_layout_block_bytes(layout.get()));
        const auto           rows = gaussian(rng, 64 * n_block * h.head_dim);
        std::vector<int64_t> cells(64 * n_block);
        std::iota(cells.begin(), cells.end(), 0);
        CHECK_EQUAL(fasa_index_write(layout.get(), rows.data(), cells.data(), 64 * n_block, index.data()), 0);
        const std::vector<uint64_t> visible = {~uint64_t{0}, rng() | uint64_t{rng()} << 32, uint64_t{rng()} & 0xffff};
        for (const int32_t group : {1, 3, 4, 7, 64}) {
            const auto   q        = gaussian(rng, group * h.head_dim);
            const Scored expected = run_score(FASA_ISA_REFERENCE, layout.get(), q, group, index, visible);
            for (const int32_t isa : usable_isas()) {
                const Case   c(std::string(fasa_isa_name(isa)) + " head_dim " + std::to_string(h.head_dim) + " bits " +
                               std::to_string(h.bits) + " group " + std::to_string(group));
                const Scored actual = run_score(isa, layout.get(), q, group, index, visible);
                double       error = 0, power = 0;
                for (size_t i = 0; i < actual.scores.size(); ++i) {
                    const size_t cell = i % (64 * n_block);
                    if ((visible[cell / 64] >> cell % 64 & 1u) == 0) {
                        CHECK_EQUAL(actual.scores[i], kHidden);
                        continue;
                    }
                    error += std::pow(actual.scores[i] - static_cast<double>(expected.scores[i]), 2);
                    power += std::pow(static_cast<double>(expected.scores[i]), 2);
                }
                CHECK_AT_MOST(error / power, kMaxScoreNmse);
                for (size_t p = 0; p < actual.peaks.size(); ++p) {
                    float best = kHidden;
                    for (int i = 0; i < 8; ++i) {
                        best = std::max(best, actual.scores[p / 8 * 64 + 8 * i + p % 8]);
                    }
                    CHECK_EQUAL(actual.peaks[p], best);
                }
            }
        }
    }
}

TEST(select_equals_the_reference) {
    std::mt19937 rng = fresh_rng();
    for (const int64_t n_block : {1, 5, 17, 600}) {
        const int64_t n = 64 * n_block;
        for (const int kind : {0, 1, 2, 3}) { // gaussian, ties, half hidden, all equal
            std::vector<float> scores = gaussian(rng, n, 3.0f);
            for (float & x : scores) {
                x = kind == 1 ? std::rint(x) : kind == 2 && rng() % 2 == 0 ? kHidden : kind == 3 ? 1.5f : x;
            }
            std::vector<float> peaks(8 * n_block, kHidden);
            for (int64_t c = 0; c < n; ++c) {
                float & peak = peaks[c / 64 * 8 + c % 8];
                peak         = std::max(peak, scores[c]);
            }
            for (const int64_t budget : {int64_t{1}, int64_t{9}, n / 8, n / 2, n - 1, n, 2 * n}) {
                std::vector<int32_t> expected;
                for (const int32_t isa : usable_isas()) {
                    const Case           c(std::string(fasa_isa_name(isa)) + " kind " + std::to_string(kind) + " n " +
                                           std::to_string(n) + " budget " + std::to_string(budget));
                    std::vector<float>   scratch(n, kNan);
                    std::vector<int32_t> cells(n, -1);
                    int64_t              n_selected = -1;
                    CHECK_EQUAL(fasa_select(isa, scores.data(), peaks.data(), n_block, budget, scratch.data(),
                                            cells.data(), &n_selected),
                                FASA_STATUS_OK);
                    cells.resize(n_selected);
                    expected = isa == FASA_ISA_REFERENCE ? cells : expected;
                    CHECK(cells == expected);
                }
            }
        }
    }
}

TEST(attend_agrees_with_the_reference) {
    std::mt19937  rng     = fresh_rng();
    const int32_t types[] = {FASA_KV_F32,  FASA_KV_F16,  FASA_KV_BF16, FASA_KV_Q8_0,  FASA_KV_Q4_0,
                             FASA_KV_Q4_1, FASA_KV_Q5_0, FASA_KV_Q5_1, FASA_KV_IQ4_NL};
    for (const int32_t k_type : types) {
        for (const int32_t v_type : types) {
            for (const auto & dims : {std::pair<int, int>{32, 32}, {64, 96}, {128, 128}, {256, 224}}) {
                if (k_type != v_type && dims.first != 64) {
                    continue;
                }
                const int64_t n_kv = 113;
                const auto    fill = [&](int32_t type, int64_t dim) {
                    const auto           x = gaussian(rng, n_kv * dim);
                    const auto           t = static_cast<ggml_type>(type);
                    std::vector<uint8_t> bytes(n_kv * ggml_row_size(t, dim));
                    ggml_quantize_chunk(t, x.data(), bytes.data(), 0, n_kv, dim, nullptr);
                    return bytes;
                };
                const std::vector<uint8_t> k = fill(k_type, dims.first);
                const std::vector<uint8_t> v = fill(v_type, dims.second);
                std::vector<uint16_t>      mask(n_kv);
                for (uint16_t & m : mask) {
                    m = rng() % 4 == 0 ? 0xfc00 : fasa::float_to_half(gaussian(rng, 1)[0]);
                }
                mask[n_kv - 1]         = 0;
                const auto           q = gaussian(rng, dims.first);
                std::vector<int32_t> cells(n_kv);
                std::iota(cells.begin(), cells.end(), 0);
                for (const float softcap : {0.0f, 5.0f}) {
                    const fasa_kv      kv = {k.data(),
                                             v.data(),
                                             static_cast<int64_t>(k.size()) / n_kv,
                                             static_cast<int64_t>(v.size()) / n_kv,
                                             k_type,
                                             v_type,
                                             dims.first,
                                             dims.second,
                                             0.2f,
                                             softcap,
                                             softcap == 0.0f ? nullptr : mask.data()};
                    std::vector<float> expected;
                    for (const int32_t isa : usable_isas()) {
                        const Case c(std::string(fasa_isa_name(isa)) + " types " + std::to_string(k_type) + " " +
                                     std::to_string(v_type) + " dims " + std::to_string(dims.first) + " " +
                                     std::to_string(dims.second));
                        std::vector<float> o(dims.second, 0.0f);
                        float              m = kHidden, d = 0.0f;
                        // Two calls: the second goes on from the first.
                        CHECK_EQUAL(fasa_attend(isa, &kv, q.data(), cells.data(), 40, &m, &d, o.data()), 0);
                        CHECK_EQUAL(fasa_attend(isa, &kv, q.data(), cells.data() + 40, n_kv - 40, &m, &d, o.data()), 0);
                        for (float & x : o) {
                            x /= d;
                        }
                        expected = isa == FASA_ISA_REFERENCE ? o : expected;
                        CHECK_AT_MOST(nmse(o, expected), kMaxAttendNmse);
                    }
                }
            }
        }
    }
}

TEST(rows_are_read_as_ggml_reads_them) {
    std::mt19937 rng = fresh_rng();
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                 GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL}) {
        const Case           c(ggml_type_name(type));
        const int64_t        n = 224;
        const auto           x = gaussian(rng, 3 * n);
        std::vector<uint8_t> bytes(3 * ggml_row_size(type, n));
        ggml_quantize_chunk(type, x.data(), bytes.data(), 0, 3, n, nullptr);
        std::vector<float> expected(3 * n), actual(3 * n, 7.0f);
        if (type == GGML_TYPE_F32) {
            expected = x;
        } else {
            ggml_get_type_traits(type)->to_float(bytes.data(), expected.data(), 3 * n);
        }
        CHECK_EQUAL(fasa_kv_to_float(type, bytes.data(), n, 3, actual.data()), FASA_STATUS_OK);
        CHECK_AT_MOST(nmse(actual, expected), 1e-13); // the last bit, where a product and a sum are fused
    }
    float one = 0;
    CHECK_EQUAL(fasa_kv_to_float(GGML_TYPE_Q4_K, &one, 256, 1, &one), FASA_STATUS_ARGUMENT);
    CHECK_EQUAL(fasa_kv_to_float(GGML_TYPE_F16, &one, 33, 1, &one), FASA_STATUS_ARGUMENT);
    CHECK_EQUAL(fasa_kv_row_bytes(GGML_TYPE_F16, -32), 0);
}

TEST(hadamard_is_the_sylvester_matrix) {
    for (const int32_t size : {1, 2, 32, 128, 256}) {
        std::mt19937       rng = fresh_rng();
        const auto         x   = gaussian(rng, 3 * size);
        std::vector<float> y   = x;
        CHECK_EQUAL(fasa_hadamard(y.data(), 3, size), FASA_STATUS_OK);
        std::vector<float> expected(x.size());
        for (int32_t i = 0; i < 3 * size; ++i) {
            double sum = 0;
            for (int32_t j = 0; j < size; ++j) {
                const int odd = __builtin_popcount(i % size & j) % 2; // entry (i, j) is -1 to the common ones
                sum += (odd != 0 ? -1.0 : 1.0) * x[i / size * size + j];
            }
            expected[i] = static_cast<float>(sum / std::sqrt(size));
        }
        CHECK_AT_MOST(nmse(y, expected), 1e-12);
        CHECK_EQUAL(fasa_hadamard(y.data(), 3, size), FASA_STATUS_OK);
        CHECK_AT_MOST(nmse(y, x), 1e-12);
    }
    float one = 1.0f;
    CHECK_EQUAL(fasa_hadamard(&one, 1, 3), FASA_STATUS_ARGUMENT);
    CHECK(std::strstr(fasa_last_error(), "power of two") != nullptr);
}

TEST(half_conversion_rounds_to_nearest) {
    for (uint32_t h = 0; h < 0x10000; ++h) {
        const float f = fasa::half_to_float(static_cast<uint16_t>(h));
        if ((h & 0x7fff) > 0x7c00) {
            CHECK(std::isnan(f));
            CHECK(std::isnan(fasa::half_to_float(fasa::float_to_half(f))));
        } else {
            CHECK_EQUAL(fasa::float_to_half(f), h);
        }
    }
    std::mt19937 rng = fresh_rng();
    for (int i = 0; i < 20000; ++i) { // ties, overflow and subnormals by way of random exponents
        const float    f    = std::ldexp(gaussian(rng, 1)[0], static_cast<int>(rng() % 50) - 30);
        const uint16_t h    = fasa::float_to_half(f);
        const float    back = fasa::half_to_float(h);
        const float    next = fasa::half_to_float(static_cast<uint16_t>(h + 1));
        if (std::isfinite(back) && std::isfinite(next)) {
            CHECK_AT_MOST(std::fabs(back - f), std::fabs(next - back) / 2);
        } else {
            CHECK(std::fabs(f) >= 65488.0f); // half a step below the largest half
        }
    }
}
