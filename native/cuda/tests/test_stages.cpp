// Every kernel against the reference, on fresh random inputs and poisoned outputs. A stage gets what the stage before
// it made on the device, so an error shows where it arises.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "hadamard.h"
#include "kernels.h"
#include "kv_type.h"
#include "stage.h"

using namespace fasa_test;

namespace {

// Queries are rounded to 127 steps of their peak. Scales of 0.5 to 4 make peaks of these tests larger than 3.5
// deviations: three times the limit of the CPU's tests, which have scales of 1.
constexpr double kMaxScoreNmse  = 1.5e-3;
constexpr double kMaxAttendNmse = 1e-9;

const StageShape kShapes[] = {
    {128, 8, 2, 1024, 1, 1, GGML_TYPE_F16, GGML_TYPE_F16, 4, 32},
    {128, 32, 8, 4096, 1, 1, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 4, 32, 512, 1024, 4, 32, 128},
    {128, 32, 8, 4096, 1, 1, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 2, 32, 512, 1024, 4, 32, 128},
    {64, 6, 2, 1025, 3, 2, GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, 0, 17, 100, 200, 2, 9, 64, 20.0f, true},
    {64, 4, 2, 900, 1, 1, GGML_TYPE_F16, GGML_TYPE_F16, 2, 16, 100, 200},
    {64, 3, 1, 113, 1, 1, GGML_TYPE_BF16, GGML_TYPE_BF16, 8, 11, 40, 50, 4, 8, 0, 0.0f, true},
    {256, 4, 4, 1300, 2, 1, GGML_TYPE_Q8_0, GGML_TYPE_F16, 0, 128, 300, 400, 4, 32, 256},
    {96, 9, 3, 700, 8, 1, GGML_TYPE_F16, GGML_TYPE_Q4_0, 2, 30, 90, 128, 0, 0, 0, 30.0f},
    {32, 5, 5, 500, 2, 3, GGML_TYPE_Q4_0, GGML_TYPE_BF16, 8, 16, 64, 64, 1, 1, 0},
    {160, 14, 2, 2049, 1, 1, GGML_TYPE_BF16, GGML_TYPE_Q8_0, 4, 80, 1500, 1600, 4, 32, 0},
    {128, 16, 1, 30000, 1, 1, GGML_TYPE_F16, GGML_TYPE_F16, 4, 16, 7000, 7000},
    {64, 2, 1, 4001, 2, 1, GGML_TYPE_F16, GGML_TYPE_F16, 4, 16, 90, 100},
    {64, 12, 4, 9000, 2, 1, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 1, 32, 300, 400, 4, 32, 64},
    {128, 4, 1, 70001, 1, 1, GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, 2, 32, 900, 1000, 4, 32, 128},
};

// Bytes of the index that are not what Layout::write makes of the keys. Sums run in another order on the device: a step
// may differ in its last bit, and with 2 bits, whose first step is such a sum, now and then a code.
void check_index(Stage & s, const char * when) {
    s.index.to_host();
    int64_t n = 0, different = 0;
    for (int64_t stream = 0; stream < s.shape.n_stream; ++stream) {
        for (int32_t h = 0; h < s.shape.n_head_kv; ++h) {
            const fasa::Layout & l = s.layouts[h];
            std::vector<uint8_t> block(l.block_bytes);
            for (int64_t b = 0; b < s.n_block; ++b) {
                std::fill(block.begin(), block.end(), 0);
                for (int64_t c = b * 64; c < std::min(s.shape.n_kv, (b + 1) * 64); ++c) {
                    l.write(s.key(stream, h, c).data(), block.data(), static_cast<int32_t>(c % 64));
                }
                const uint8_t * actual = s.block(s.index.host, stream, h, b);
                for (int64_t i = 0; i < l.block_bytes; ++i) {
                    different += actual[i] != block[i] ? 1 : 0;
                }
                n += l.block_bytes;
            }
        }
    }
    const Case c(when);
    CHECK_AT_MOST(static_cast<double>(different) / static_cast<double>(n), 1e-3);
}

// The new cells and the first and last visible ones of a query of a stream, by its scores x.
std::vector<bool> forced_cells(const Stage & s, int64_t stream, const float * x, int64_t n) {
    std::vector<bool> forced(n, false);
    for (const int64_t cell : s.new_cells.host) {
        const int64_t c = cell - (s.first_stream + stream) * s.n_cell;
        if (c >= 0 && c < s.shape.n_kv) {
            forced[c] = x[c] > fasa::kHidden;
        }
    }
    int32_t first = s.shape.n_first, last = s.shape.n_last;
    for (int64_t c = 0; c < n && first > 0; ++c) {
        first -= x[c] > fasa::kHidden ? 1 : 0;
        forced[c] = forced[c] || x[c] > fasa::kHidden;
    }
    for (int64_t c = n - 1; c >= 0 && last > 0; --c) {
        last -= x[c] > fasa::kHidden ? 1 : 0;
        forced[c] = forced[c] || x[c] > fasa::kHidden;
    }
    return forced;
}

void check_scores(Stage & s) {
    s.scores.to_host();
    s.peaks.to_host();
    s.n_visible.to_host();
    const int64_t n     = s.n_block * 64;
    const int64_t group = s.shape.n_head / s.shape.n_head_kv;
    for (int64_t query = 0; query < s.n_query(); ++query) {
        const int64_t head = query % s.shape.n_head, row = query / s.shape.n_head % s.shape.n_rows;
        const int64_t stream = query / s.shape.n_head / s.shape.n_rows;
        const auto    h_kv   = static_cast<int32_t>(head / group);
        const float * at =
            s.q.host.data() + ((stream * s.shape.n_head + head) * s.shape.n_rows + row) * s.shape.head_dim;
        std::vector<float> q(at, at + s.shape.head_dim), expected(n), peaks(n / 8);
        fasa::undo_rotation(q.data(), s.shape.head_dim, s.shape.rotation);
        std::vector<uint64_t> visible(s.n_block, 0);
        int64_t               n_visible = 0;
        for (int64_t c = 0; c < s.shape.n_kv; ++c) {
            visible[c / 64] |= uint64_t{s.visible(stream, row, c)} << (c % 64);
            n_visible += s.visible(stream, row, c) ? 1 : 0;
        }
        fasa::kReference.score(s.layouts[h_kv], q.data(), 1, s.block(s.index.host, stream, h_kv, 0), visible.data(),
                               s.n_block, 0, s.n_block, expected.data(), peaks.data());
        const float * actual = s.scores.host.data() + query * n;
        double        error = 0, power = 0;
        const auto    forced = forced_cells(s, stream, expected.data(), n);
        for (int64_t c = 0; c < n; ++c) {
            if (expected[c] == fasa::kHidden) {
                CHECK_EQUAL(actual[c], fasa::kHidden);
                continue;
            }
            if (forced[c]) {
                CHECK_EQUAL(actual[c], fasa::gpu::kForced);
                continue;
            }
            error += std::pow(static_cast<double>(actual[c]) - expected[c], 2);
            power += std::pow(static_cast<double>(expected[c]), 2);
        }
        CHECK_AT_MOST(error / power, kMaxScoreNmse);
        for (int64_t p = 0; p < n / 8; ++p) {
            CHECK_EQUAL(s.peaks.host[query * n / 8 + p], *std::max_element(actual + 8 * p, actual + 8 * p + 8));
        }
        CHECK_EQUAL(s.n_visible.host[stream * s.shape.n_rows + row], n_visible);
    }
}

void check_selection(Stage & s, const std::vector<float> & scores) {
    s.cells.to_host();
    s.n_selected.to_host();
    const int64_t n = s.n_block * 64;
    for (int64_t query = 0; query < s.n_query(); ++query) {
        const float *     x         = scores.data() + query * n;
        const int64_t     n_visible = n - std::count(x, x + n, fasa::kHidden);
        const bool        all       = n_visible <= s.shape.budget || n_visible < s.shape.min_ctx;
        const int64_t     wanted    = all ? n_visible : s.shape.budget;
        const int32_t *   cells     = s.cells.host.data() + query * s.node.max_selected;
        std::vector<bool> selected(n, false);
        CHECK_EQUAL(s.n_selected.host[query], wanted);
        for (int64_t i = 0; i < wanted; ++i) {
            CHECK(cells[i] >= 0 && cells[i] < n);
            CHECK(i == 0 || cells[i] > cells[i - 1]);
            CHECK(x[cells[i]] > fasa::kHidden);
            selected[cells[i]] = true;
        }
        if (all) {
            continue;
        }
        const auto forced = forced_cells(s, query / s.shape.n_head / s.shape.n_rows, x, n);
        float      least = std::numeric_limits<float>::infinity(), most = fasa::kHidden;
        for (int64_t c = 0; c < n; ++c) {
            CHECK(!forced[c] || selected[c]);
            if (selected[c] && !forced[c]) {
                least = std::min(least, x[c]);
            } else if (!selected[c]) {
                most = std::max(most, x[c]);
            }
        }
        CHECK(least >= most);
    }
}

void check_attention(Stage & s) {
    s.out.to_host();
    const int64_t      dim = s.shape.head_dim, group = s.shape.n_head / s.shape.n_head_kv;
    std::vector<float> actual, expected;
    for (int64_t query = 0; query < s.n_query(); ++query) {
        const int64_t head = query % s.shape.n_head, row = query / s.shape.n_head % s.shape.n_rows;
        const int64_t stream = query / s.shape.n_head / s.shape.n_rows;
        const auto    data   = [&](const Copied<uint8_t> & cache, ggml_type type) {
            return cache.host.data() +
                   ((s.first_stream + stream) * s.n_cell * s.shape.n_head_kv + head / group) * s.row_bytes(type);
        };
        fasa_kv kv  = {};
        kv.k        = data(s.k, s.shape.k_type);
        kv.v        = data(s.v, s.shape.v_type);
        kv.k_stride = s.node.k.cell;
        kv.v_stride = s.node.v.cell;
        kv.k_type   = s.shape.k_type;
        kv.v_type   = s.shape.v_type;
        kv.k_dim = kv.v_dim  = s.shape.head_dim;
        kv.scale             = s.node.scale;
        kv.softcap           = s.shape.softcap;
        kv.mask              = s.mask.host.data() + (stream * s.shape.n_rows + row) * s.shape.n_kv;
        float              m = fasa::kHidden, d = 0;
        std::vector<float> o(dim, 0.0f);
        fasa::kReference.attend(kv, s.q.host.data() + ((stream * s.shape.n_head + head) * s.shape.n_rows + row) * dim,
                                s.cells.host.data() + query * s.node.max_selected, s.n_selected.host[query], &m, &d,
                                o.data());
        if (s.shape.sinks) {
            const float top = std::max(m, s.sinks.host[head]);
            d               = d * std::exp(m - top) + std::exp(s.sinks.host[head] - top);
            for (float & x : o) {
                x *= std::exp(m - top);
            }
        }
        for (int64_t i = 0; i < dim; ++i) {
            expected.push_back(d == 0 ? 0.0f : o[i] / d);
            actual.push_back(s.out.host[query * (dim + 8) + i]);
        }
        for (int64_t i = dim; i < dim + 8; ++i) {
            CHECK(std::isnan(s.out.host[query * (dim + 8) + i])); // the poison between heads
        }
    }
    CHECK_AT_MOST(nmse(actual, expected), kMaxAttendNmse);
}

// Under compute-sanitizer everything takes a hundred times as long.
bool only_small() { return std::getenv("FASA_CUDA_SHAPES") != nullptr; }

int32_t max_block_bytes(const Stage & s) {
    int64_t most = 0;
    for (const auto & l : s.layouts) {
        most = std::max(most, l.block_bytes);
    }
    return static_cast<int32_t>(most);
}

} // namespace

TEST(stages_agree_with_the_reference) {
    std::mt19937 rng  = fresh_rng();
    int64_t      used = 0;
    for (const StageShape & shape : kShapes) {
        if (only_small() && shape.n_kv * shape.n_head > 10000) {
            continue;
        }
        const Case c(shape.text());
        Stage      s(rng, shape);
        auto *     device = cuda_stream()->device();
        CHECK_EQUAL(cuda_api()->rebuild(device, &s.node, 0, max_block_bytes(s), nullptr), 0);
        check_index(s, "rebuilt");
        const std::vector<uint8_t> before = s.index.host;

        for (const int64_t cell : s.new_cells.host) {
            s.write_random_rows(rng, cell);
        }
        s.k.to_device();
        s.v.to_device();
        CHECK_EQUAL(cuda_api()->prepare(device, &s.node), 0);
        CHECK_EQUAL(cuda_api()->score(device, &s.node), 0);
        check_scores(s);
        const std::vector<float> scores = s.scores.host;
        // Memory that is called ahead changes nothing, whatever its size.
        s.node.ahead[0] = {s.k.device.get(), static_cast<int64_t>(s.k.host.size()) - 3};
        s.node.ahead[2] = {s.v.device.get(), static_cast<int64_t>(s.v.host.size())};
        CHECK_EQUAL(cuda_api()->select(device, &s.node), 0);
        check_selection(s, scores);
        CHECK_EQUAL(cuda_api()->attend(device, &s.node), 0);
        check_attention(s);
        s.arrived.to_host();
        CHECK_EQUAL(std::count(s.arrived.host.begin(), s.arrived.host.end(), 0), s.n_query());
        s.totals.to_host();
        int64_t attended = 0;
        for (const int32_t n : s.n_selected.host) {
            attended += n;
        }
        CHECK_EQUAL(s.totals.host[1], attended);

        CHECK_EQUAL(cuda_api()->encode(device, &s.node), 0);
        check_index(s, "with new cells");
        CHECK(before != s.index.host);
        // The same bytes as a rebuild of everything.
        CHECK_EQUAL(cuda_api()->rebuild(device, &s.node, 0, max_block_bytes(s), s.totals.device.get() + 2), 0);
        s.totals.to_host();
        CHECK_EQUAL(s.totals.host[2], 0);

        // Nothing depends on which thread comes first, on whether new cells have their entries yet, which now they
        // have, nor on whether marks are of use, which they are from the second time on.
        const auto first    = s.out.host;
        const auto selected = s.cells.host;
        for (int i = 0; i < 3; ++i) {
            s.out.poison(static_cast<int64_t>(first.size()));
            CHECK_EQUAL(cuda_api()->prepare(device, &s.node), 0);
            CHECK_EQUAL(cuda_api()->score(device, &s.node), 0);
            CHECK_EQUAL(cuda_api()->select(device, &s.node), 0);
            CHECK_EQUAL(cuda_api()->attend(device, &s.node), 0);
            s.out.to_host();
            CHECK(std::memcmp(first.data(), s.out.host.data(), first.size() * sizeof(float)) == 0);
            s.cells.to_host();
            CHECK(selected == s.cells.host);
        }
        s.totals.to_host();
        used += s.totals.host[3];
    }
    CHECK(only_small() || used > 0);
}

// Cells, and budget: from the first 16,384 cells on they are contexts of which all cells are looked at, whole and half
// full, and for some a filter says where to count; one has a block too many for that.
const std::pair<int32_t, int32_t> kUgly[] = {{40000, 1},     {40000, 7},    {40000, 1500},  {40000, 2048},
                                             {40000, 6144},  {40000, 9000}, {40000, 39000}, {16384, 2048},
                                             {16384, 16000}, {16321, 6144}, {8100, 1100},   {8192, 8000},
                                             {16400, 2048},  {8100, 2000},  {4500, 1100}};

// Scores that make a radix select stumble: ties, outliers, few distinct values, more candidates than shared memory
// holds.
TEST(select_is_exact_on_ugly_scores) {
    std::mt19937 rng     = fresh_rng();
    StageShape   shape   = {32, 8, 8, 0, 1, 1, GGML_TYPE_F16, GGML_TYPE_F16, 4, 8};
    const float  inf     = 3.0e38f;
    const auto   uniform = [&rng] { return static_cast<float>(rng()) / 4294967296.0f; };
    for (const auto & [n_kv, budget] : kUgly) {
        if (only_small() && budget > 1100) {
            continue;
        }
        shape.n_kv    = n_kv;
        shape.budget  = budget;
        shape.min_ctx = 0;
        shape.n_first = std::min(4, budget / 2);
        shape.n_last  = std::min(32, budget / 2);
        Stage s(rng, shape);
        s.new_cells.host.clear();
        s.node.n_new = 0;
        CHECK_EQUAL(cuda_api()->prepare(cuda_stream()->device(), &s.node), 0); // clears the counts of visible cells
        s.n_visible.host.assign(1, n_kv);
        s.n_visible.to_device();
        const int64_t n = s.n_block * 64;
        for (int64_t query = 0; query < 8; ++query) {
            for (int64_t c = 0; c < n; ++c) {
                float x = 0;
                switch (query) {
                    case 0: x = 1.0f; break;                                                  // all equal
                    case 1: x = static_cast<float>(rng() % 3); break;                         // few values
                    case 2: x = c == 777 ? inf : uniform(); break;                            // an outlier
                    case 3: x = c % 1000 == 0 ? -inf : c % 999 == 0 ? inf : uniform(); break; // both ends
                    case 4: x = std::ldexp(uniform() - 0.5f, static_cast<int>(rng() % 200) - 100); break;
                    case 5: x = static_cast<float>(c) * 1e-3f; break;            // ascending
                    case 6: x = -static_cast<float>(c / 500); break;             // long runs of ties
                    default: x = c < 3000 ? 5.0f + uniform() : uniform(); break; // crowded in a few peaks
                }
                s.scores.host[query * n + c] = c < n_kv ? x : fasa::kHidden;
            }
            const auto forced = forced_cells(s, 0, s.scores.host.data() + query * n, n);
            for (int64_t c = 0; c < n; ++c) { // as score leaves it
                s.scores.host[query * n + c] = forced[c] ? fasa::gpu::kForced : s.scores.host[query * n + c];
            }
            for (int64_t p = 0; p < n / 8; ++p) {
                const float * x                 = s.scores.host.data() + query * n + 8 * p;
                s.peaks.host[query * n / 8 + p] = *std::max_element(x, x + 8);
            }
        }
        const auto scores = s.scores.host;
        s.scores.to_device();
        s.peaks.to_device();
        s.norms.host.assign(8, 1.0f);
        s.norms.to_device();
        const float infinity = std::numeric_limits<float>::infinity();
        s.thresholds.host.assign(8, {infinity, infinity}); // nothing is marked
        s.thresholds.to_device();
        const Case c(std::to_string(budget) + " of " + std::to_string(n_kv));
        CHECK_EQUAL(cuda_api()->select(cuda_stream()->device(), &s.node), 0);
        check_selection(s, scores);
        const auto all = s.cells.host;

        // The same from marks of all cells that reach some threshold; what is said of the level is a guess. Of query 4,
        // whose values differ, it is above the mark: that one can be selected from its marks.
        const Case from("from marks");
        for (int64_t query = 0; query < 8; ++query) {
            const float *      x = scores.data() + query * n;
            std::vector<float> sorted(x, x + n_kv);
            std::sort(sorted.begin(), sorted.end(), std::greater<float>());
            const bool   good = query == 4;
            const size_t more = good ? 1 : rng() % (budget + 1), at = std::min(sorted.size() - 1, budget - 1 + more);
            s.thresholds.host[query] = {sorted[at], sorted[good || rng() % 2 == 0 ? at * 3 / 4 : rng() % (at + 1)]};
            for (int64_t word = 0; word < n / 32; ++word) {
                uint32_t bits = 0;
                for (int i = 0; i < 32; ++i) {
                    bits |= x[32 * word + i] >= sorted[at] ? 1u << i : 0u;
                }
                s.marks.host[query * (n / 32) + word] = bits;
            }
        }
        s.thresholds.to_device();
        s.marks.to_device();
        CHECK_EQUAL(cuda_api()->select(cuda_stream()->device(), &s.node), 0);
        check_selection(s, scores);
        CHECK(all == s.cells.host);
        s.totals.to_host();
        CHECK(s.totals.host[3] > 0 || budget >= 6144 || n_kv < 4 * budget); // a query whose filter was right
    }
}
