// libFuzzer on the pure functions of the C interface: any values give a status and a sentence, or the result of the
// reference kernels. Pointers and lengths of arrays are kept as promised.
#include <string>

#include "half.h"
#include "input.h"
#include "kernels.h"

using namespace fasa_fuzz;

namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

struct FreeLayout {
    void operator()(fasa_layout * layout) const { fasa_layout_free(layout); }
};

std::vector<int32_t> isas(Input & in) {
    std::vector<int32_t> all;
    for (int32_t isa = 0; isa < FASA_ISA_COUNT; ++isa) {
        if (fasa_isa_usable(isa) != 0) {
            all.push_back(isa);
        }
    }
    all.push_back(in.number<int32_t>(-1, FASA_ISA_COUNT - 1));
    return all;
}

bool all_finite(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float v) { return std::isfinite(v); });
}

double power(const float * x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        sum += static_cast<double>(x[i]) * x[i];
    }
    return sum;
}

// Blocks b0 to b1 of the queries are written, and nothing else.
void check_scores(const float * scores, const float * peaks, const uint64_t * visible, int32_t n_q, int64_t n_block,
                  int64_t b0, int64_t b1, bool finite) {
    for (int64_t i = 0; i < n_q * n_block; ++i) {
        const int64_t b = i % n_block;
        float         best[FASA_PEAKS];
        std::fill_n(best, FASA_PEAKS, kHidden);
        for (int64_t c = 0; c < FASA_BLOCK_CELLS; ++c) {
            const float x = scores[i * FASA_BLOCK_CELLS + c];
            if (b < b0 || b >= b1) {
                expect(std::isnan(x), "score wrote outside its blocks");
            } else if ((visible[b] >> c & 1u) == 0) {
                expect(x == kHidden, "a hidden cell has a score");
            } else {
                expect(!finite || std::isfinite(x), "finite values gave a score that is not");
            }
            best[c % FASA_PEAKS] = std::max(best[c % FASA_PEAKS], x);
        }
        for (int64_t g = 0; finite && b >= b0 && b < b1 && g < FASA_PEAKS; ++g) {
            expect(peaks[i * FASA_PEAKS + g] == best[g], "a peak is not the best score of its cells");
        }
    }
}

// Fast kernels score with queries of few levels; with these values the reference says the same.
Array<float> rounded_queries(const fasa::Layout & layout, const float * q, int64_t n_q) {
    Array<float> rounded(new float[n_q * layout.head_dim]());
    for (int64_t h = 0; h < n_q; ++h) {
        fasa::ScoreQuery ready;
        ready.prepare(layout, q + h * layout.head_dim);
        for (size_t s = 0; s < layout.segments.size(); ++s) {
            for (int32_t i = 0; i < 4 * layout.segments[s].n_quad; ++i) {
                const int32_t slot = layout.segments[s].slot + i;
                if (layout.dims[slot] != fasa::Layout::kNoDim) {
                    rounded[h * layout.head_dim + layout.dims[slot]] =
                        static_cast<float>(ready.codes[slot]) * ready.step[s] / layout.scale[slot];
                }
            }
        }
    }
    return rounded;
}

void layout_write_score(Input & in) {
    const int32_t   head_dim = in.chance(2) ? in.number<int32_t>(2, 256) / 2 * 2 : in.number<int32_t>(2, 64);
    const int32_t   n_rot    = in.number<int32_t>(1, std::clamp(head_dim, 1, 256) / 2) * int64_t{2} % INT32_MAX;
    const int32_t   rope     = in.number<int32_t>(0, 1) * int64_t{2} % INT32_MAX;
    const int32_t   n_fc     = in.number<int32_t>(1, std::clamp(head_dim / 2, 1, 128));
    const int32_t   n_given  = std::clamp(n_fc, 0, 128); // what is out of range must not be read
    const int32_t   n_dim    = std::clamp(head_dim, 0, 256);
    const bool      hostile  = in.chance(4);
    Array<uint16_t> fc(new uint16_t[n_given]);
    Array<uint8_t>  bits(new uint8_t[n_given]);
    const int32_t   step = in.chance(2) ? 1 : 3; // 3 has no common factor with a power of two
    for (int32_t i = 0; i < n_given; ++i) {
        fc[i]   = in.chance(32) ? in.raw<uint16_t>() : static_cast<uint16_t>(i * step % std::max(1, head_dim / 2));
        bits[i] = in.chance(32) ? in.raw<uint8_t>() : static_cast<uint8_t>(1 << in.within(0, 3));
    }
    const auto center = in.reals(n_dim, hostile), scale = in.reals(n_dim, hostile);
    for (int32_t i = 0; i < n_dim && !hostile; ++i) {
        scale[i] = std::fabs(scale[i]) + 0.05f;
    }
    const bool    with_center = in.chance(2), with_scale = in.chance(2);
    fasa_layout * created = nullptr;
    if (!called(fasa_layout_create(head_dim, n_rot, rope, n_fc, fc.get(), bits.get(),
                                   with_center ? center.get() : nullptr, with_scale ? scale.get() : nullptr,
                                   &created))) {
        expect(created == nullptr, "a layout in spite of a failure");
        return;
    }
    const std::unique_ptr<fasa_layout, FreeLayout> layout(created);
    const int64_t                                  block = fasa_layout_block_bytes(created);
    expect(block > 0 && block <= FASA_BLOCK_CELLS * (3 * 2 + 256 + 6), "block bytes out of any range");

    const int64_t  n_block = in.within(1, 4);
    const int64_t  n_row   = in.within(0, 64 * n_block);
    const bool     wild    = in.chance(4);
    const bool     refused = in.chance(16);
    const int64_t  n       = refused ? -in.within(1, 70) : n_row;
    const int32_t  n_q     = in.number<int32_t>(1, 9);
    const int64_t  n_bad   = in.number<int64_t>(n_block, n_block);
    const int64_t  b0      = in.number<int64_t>(0, n_block);
    const int64_t  left    = in.number<int64_t>(0, n_block);
    const int64_t  b1      = static_cast<int64_t>(static_cast<uint64_t>(n_block) - static_cast<uint64_t>(left));
    const auto     rows    = in.reals(n_row * head_dim, wild);
    Array<int64_t> cells(new int64_t[n_row]);
    Array<uint8_t> index(new uint8_t[n_block * block]());
    for (int64_t i = 0; i < n_row; ++i) {
        cells[i] = in.chance(64) ? -in.within(1, 1000) : i * 7 % (64 * n_block);
    }
    const bool written = called(fasa_index_write(created, rows.get(), cells.get(), n, index.get()));
    expect(!(refused && written), "a negative number of cells was accepted");

    const auto    visible = in.bytes<uint64_t>(n_block);
    const auto    q       = in.reals(int64_t{std::clamp(n_q, 0, 64)} * head_dim, wild);
    const int64_t n_head  = std::clamp(n_q, 0, 64);
    const bool    valid = n_q >= 1 && n_q <= FASA_MAX_GROUP && n_bad == n_block && b0 >= 0 && b0 <= b1 && b1 <= n_block;
    // A range of blocks that is empty reads nothing, so it may lie in an index of any size.
    if (!valid && n_bad != n_block && b0 != b1) {
        return;
    }
    const bool         finite = !wild && !hostile && all_finite(q.get(), n_head * head_dim);
    const fasa::Layout same(head_dim, n_rot, rope, n_fc, fc.get(), bits.get(), with_center ? center.get() : nullptr,
                            with_scale ? scale.get() : nullptr);
    const auto         rounded = rounded_queries(same, q.get(), finite ? n_head : 0);
    Array<float>       expected;
    for (const int32_t isa : isas(in)) {
        const bool    reference = isa == FASA_ISA_REFERENCE && finite;
        const int64_t n_score = n_head * n_block * FASA_BLOCK_CELLS, n_peak = n_head * n_block * FASA_PEAKS;
        Array<float>  scores(new float[n_score]), peaks(new float[n_peak]);
        std::fill_n(scores.get(), n_score, kPoison);
        std::fill_n(peaks.get(), n_peak, kPoison);
        const bool ok = called(fasa_score(isa, created, reference ? rounded.get() : q.get(), n_q, index.get(),
                                          visible.get(), n_bad, b0, b1, scores.get(), peaks.get()));
        expect(!ok || (n_q >= 1 && n_q <= FASA_MAX_GROUP && b0 >= 0 && b0 <= b1 && b1 <= n_bad &&
                       (isa == FASA_ISA_AUTO || fasa_isa_usable(isa) != 0)),
               "score accepted values out of range");
        if (!ok || !valid) {
            continue;
        }
        check_scores(scores.get(), peaks.get(), visible.get(), n_q, n_block, b0, b1, finite);
        if (reference) {
            expected = std::move(scores);
        }
        // Products of q and k may be large and cancel: the limit comes from their sizes.
        const double limit = 1e-5 * std::sqrt(power(q.get(), n_head * head_dim)) * 16 * std::sqrt(head_dim);
        for (int64_t i = 0; i < n_score && finite && !reference; ++i) {
            expect(!std::isfinite(expected[i]) || std::fabs(scores[i] - expected[i]) <= limit,
                   "score differs from the reference");
        }
    }
}

void select(Input & in) {
    const int64_t n_block = in.number<int64_t>(0, in.chance(4) ? 40 : 6);
    const int64_t n_real  = std::clamp<int64_t>(n_block, 0, 40);
    if (n_block != n_real && n_block >= 0) {
        return; // more than 40 blocks would have to be there
    }
    const int64_t n       = n_real * FASA_BLOCK_CELLS;
    const bool    hostile = in.chance(3);
    const int64_t budget  = in.number<int64_t>(1, std::max<int64_t>(1, n));
    const int     kind    = static_cast<int>(in.within(0, 3)); // as they come, many ties, many hidden, all alike
    const auto    scores  = in.reals(n, hostile);
    for (int64_t i = 0; i < n && !hostile; ++i) {
        scores[i] = kind == 1   ? std::nearbyint(scores[i])
                    : kind == 2 ? (scores[i] < 0 ? kHidden : scores[i])
                    : kind == 3 ? 1.5f
                                : scores[i];
    }
    Array<float> peaks(new float[n_real * FASA_PEAKS]);
    std::fill_n(peaks.get(), n_real * FASA_PEAKS, kHidden);
    for (int64_t i = 0; i < n; ++i) {
        float & peak = peaks[i / FASA_BLOCK_CELLS * FASA_PEAKS + i % FASA_PEAKS];
        peak         = std::max(peak, scores[i]);
    }
    std::vector<int32_t> expected;
    for (const int32_t isa : isas(in)) {
        Array<float>   scratch(new float[n]);
        Array<int32_t> cells(new int32_t[n]);
        std::fill_n(scratch.get(), n, kPoison);
        int64_t n_selected = -1;
        if (!called(fasa_select(isa, scores.get(), peaks.get(), n_block, budget, scratch.get(), cells.get(),
                                &n_selected))) {
            continue;
        }
        expect(budget >= 1 && n_block >= 0, "select accepted values out of range");
        expect(n_selected >= 0 && n_selected <= std::min(n, budget), "select gave more cells than asked for");
        for (int64_t i = 0; i < n_selected; ++i) {
            expect(cells[i] >= 0 && cells[i] < n, "a selected cell is outside the scores");
            expect(i == 0 || cells[i] > cells[i - 1], "selected cells are not ascending");
        }
        if (!hostile) {
            const std::vector<int32_t> found(cells.get(), cells.get() + n_selected);
            expected = isa == FASA_ISA_REFERENCE ? found : expected;
            expect(found == expected, "select differs from the reference");
        }
    }
}

// Every type, and where the halves or floats of a block of 32 values stand; the rest are codes.
struct RowType {
    int32_t id, block_bytes, n_number, number_bytes;
};
const RowType kTypes[] = {{FASA_KV_F32, 128, 32, 4}, {FASA_KV_F16, 64, 32, 2}, {FASA_KV_BF16, 64, 32, 2},
                          {FASA_KV_Q8_0, 34, 1, 2},  {FASA_KV_Q4_0, 18, 1, 2}, {FASA_KV_Q4_1, 20, 2, 2},
                          {FASA_KV_Q5_0, 22, 1, 2},  {FASA_KV_Q5_1, 24, 2, 2}, {FASA_KV_IQ4_NL, 18, 1, 2}};

// Rows of any bytes; unless hostile, their numbers are of moderate size.
Array<uint8_t> rows_of(Input & in, int32_t id, int64_t n_bytes, bool hostile) {
    auto         rows = in.bytes<uint8_t>(n_bytes);
    const auto * type =
        std::find_if(std::begin(kTypes), std::end(kTypes), [&](const RowType & t) { return t.id == id; });
    if (hostile || type == std::end(kTypes)) {
        return rows;
    }
    for (int64_t block = 0; block < n_bytes; block += type->block_bytes) {
        for (int32_t i = 0; i < type->n_number; ++i) {
            uint8_t *   at = rows.get() + block + i * type->number_bytes;
            const float x  = static_cast<float>(static_cast<int8_t>(*at)) / (type->n_number > 2 ? 32.0f : 2048.0f);
            uint32_t    bits;
            std::memcpy(&bits, &x, sizeof(bits));
            bits = type->number_bytes == 4 ? bits : id == FASA_KV_BF16 ? bits >> 16 : fasa::float_to_half(x);
            std::memcpy(at, &bits, type->number_bytes);
        }
    }
    return rows;
}

void read_rows(Input & in) {
    const int32_t type   = in.chance(4) ? in.number<int32_t>(-2, 40) : kTypes[in.within(0, 8)].id;
    const int64_t n      = in.chance(4) ? in.number<int64_t>(0, 300) : 32 * in.within(1, 8);
    const int64_t n_rows = in.number<int64_t>(0, 3);
    const int64_t bytes  = fasa_kv_row_bytes(type, n);
    if (n_rows > 3 || (n > 300 && bytes > 0)) {
        return; // more than is here
    }
    const int64_t n_real = std::clamp<int64_t>(n, 0, 300) * std::clamp<int64_t>(n_rows, 0, 3);
    const auto    rows   = rows_of(in, type, bytes * std::clamp<int64_t>(n_rows, 0, 3), true);
    Array<float>  out(new float[n_real]);
    if (called(fasa_kv_to_float(type, rows.get(), n, n_rows, out.get()))) {
        expect(bytes > 0 && n_rows >= 0, "kv_to_float accepted values out of range");
    }
}

void attend(Input & in) {
    const auto dim_of = [&] {
        return in.chance(8) ? in.number<int32_t>(1, 300) : 32 * static_cast<int32_t>(in.within(1, 8));
    };
    const auto    type_of = [&] { return in.chance(16) ? in.number<int32_t>(-2, 40) : kTypes[in.within(0, 8)].id; };
    const int32_t k_dim = dim_of(), v_dim = dim_of(), k_type = type_of(), v_type = type_of();
    const int64_t k_row        = fasa::kv_row_bytes(k_type, std::clamp(k_dim, 0, 256));
    const int64_t v_row        = fasa::kv_row_bytes(v_type, std::clamp(v_dim, 0, 256));
    const int64_t n_cell       = 80 - in.within(0, 79);
    const int64_t n            = in.chance(16) ? -in.within(1, 100) : n_cell - in.within(0, n_cell);
    const bool    short_stride = in.chance(16), hostile = in.chance(3), masked = in.chance(2);
    fasa_kv       kv = {};
    kv.k_stride      = short_stride ? in.within(-k_row, k_row - 1) : k_row;
    kv.v_stride      = v_row;
    kv.k_type        = k_type;
    kv.v_type        = v_type;
    kv.k_dim         = k_dim;
    kv.v_dim         = v_dim;
    kv.scale         = in.real(hostile);
    kv.softcap       = in.chance(2) ? in.real(hostile) : 0.0f;

    const auto q    = in.reals(std::clamp(k_dim, 0, 300), hostile);
    const auto mask = in.bytes<uint16_t>(n_cell);
    for (int64_t i = 0; i < n_cell && !hostile; ++i) {
        mask[i] = mask[i] % 4 == 0 ? fasa::kHalfMinusInf : 0;
    }
    const auto k = rows_of(in, k_type, k_row * n_cell, hostile), v = rows_of(in, v_type, v_row * n_cell, hostile);
    kv.k    = k.get();
    kv.v    = v.get();
    kv.mask = masked ? mask.get() : nullptr;
    Array<int32_t> cells(new int32_t[std::max<int64_t>(n, 0)]);
    for (int64_t i = 0; i < n; ++i) {
        cells[i] = static_cast<int32_t>((i * 13 + 5) % n_cell);
    }
    const bool         valid = n >= 0 && k_row > 0 && v_row > 0 && k_dim <= 256 && v_dim <= 256 && k_dim % 32 == 0 &&
                               v_dim % 32 == 0 && !short_stride;
    std::vector<float> expected;
    float              expected_d = 0.0f;
    for (const int32_t isa : isas(in)) {
        const int64_t n_out = std::clamp(v_dim, 0, 300);
        Array<float>  o(new float[n_out]());
        float         m = kHidden, d = 0.0f;
        if (!called(fasa_attend(isa, &kv, q.get(), cells.get(), n, &m, &d, o.get()))) {
            expect(!valid || fasa_isa_usable(isa) == 0, "attend refused valid values");
            continue;
        }
        expect(valid, "attend accepted values out of range");
        if (hostile || std::fabs(kv.scale) > 1 || std::fabs(kv.softcap) > 100) {
            continue;
        }
        std::vector<float> found(o.get(), o.get() + n_out);
        for (float & x : found) {
            x = d == 0.0f ? 0.0f : x / d;
        }
        if (isa == FASA_ISA_REFERENCE) {
            expected   = found;
            expected_d = d;
            continue;
        }
        expect((d == 0.0f) == (expected_d == 0.0f), "kernels disagree on whether anything is visible");
        double error = 0;
        for (int64_t i = 0; i < n_out; ++i) {
            error += std::pow(static_cast<double>(found[i]) - expected[i], 2);
        }
        expect(error <= 1e-4 * power(expected.data(), n_out) + 1e-6, "attend differs from the reference");
    }
}

void hadamard(Input & in) {
    const int32_t size   = in.chance(4) ? in.number<int32_t>(0, 600) : 1 << in.within(0, 10);
    const int64_t n      = in.number<int64_t>(0, 3);
    const int64_t n_real = size >= 1 && size <= 1024 && n >= 0 && n <= 3 ? size * n : 0;
    if (n > 3 || (n > 0 && size > 1024)) {
        return;
    }
    const auto x = in.reals(n_real, true);
    if (called(fasa_hadamard(x.get(), n, size))) {
        expect(n >= 0 && size >= 1 && (size & (size - 1)) == 0, "hadamard accepted values out of range");
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    Input in(data, size);
    switch (in.raw<uint8_t>() % 9) {
        case 0:
        case 1:
        case 2: layout_write_score(in); break;
        case 3:
        case 4: select(in); break;
        case 5:
        case 6: attend(in); break;
        case 7: read_rows(in); break;
        default: hadamard(in); break;
    }
    return 0;
}
