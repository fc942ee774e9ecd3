// The stages as plain loops with double accumulators: the definition that the fast kernels are tested against.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "half.h"
#include "kernels.h"

namespace fasa {

namespace {

// TIP, eq. 5: score(cell) = sum over kept dims of q * k, k as the index stores it.
double score_cell(const Layout & layout, const float * q, const uint8_t * block, int32_t cell) {
    double score = 0;
    for (const Segment & segment : layout.segments) {
        const uint8_t * steps  = block + segment.offset;
        const double    step   = step_value(steps[cell]);
        const double    middle = 0.5 * ((1 << segment.bits) - 1);
        for (int32_t i = 0; i < 4 * segment.n_quad; ++i) {
            const int32_t slot = segment.slot + i;
            if (layout.dims[slot] == Layout::kNoDim) {
                continue;
            }
            const CodePlace at   = code_place(segment.bits, i, cell);
            const uint8_t   byte = steps[kStepsBytes + at.byte];
            const int32_t   code = (byte >> at.shift) & ((1 << segment.bits) - 1);
            score += static_cast<double>(q[layout.dims[slot]]) * layout.scale[slot] * step * (code - middle);
        }
    }
    return score;
}

void score(const Layout & layout, const float * q, int32_t n_q, const uint8_t * index, const uint64_t * visible,
           int64_t n_block, int64_t b0, int64_t b1, float * scores, float * peaks) {
    for (int32_t h = 0; h < n_q; ++h) {
        for (int64_t b = b0; b < b1; ++b) {
            const uint8_t * block = index + b * layout.block_bytes;
            float *         out   = scores + (h * n_block + b) * FASA_BLOCK_CELLS;
            float *         peak  = peaks + (h * n_block + b) * FASA_PEAKS;
            std::fill(peak, peak + FASA_PEAKS, kHidden);
            for (int32_t c = 0; c < FASA_BLOCK_CELLS; ++c) {
                const bool seen = (visible[b] >> c & 1u) != 0;
                out[c] = seen ? static_cast<float>(score_cell(layout, q + h * layout.head_dim, block, c)) : kHidden;
                peak[c % FASA_PEAKS] = std::max(peak[c % FASA_PEAKS], out[c]);
            }
        }
    }
}

int64_t select(const float * scores, const float *, int64_t n_block, int64_t budget, float *, int32_t * cells) {
    int64_t n = 0;
    for (int32_t c = 0; c < n_block * FASA_BLOCK_CELLS; ++c) {
        if (scores[c] > kHidden) {
            cells[n++] = c;
        }
    }
    const int64_t k = std::min(budget, n);
    std::partial_sort(cells, cells + k, cells + n, [scores](int32_t a, int32_t b) {
        return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    });
    std::sort(cells, cells + k);
    return k;
}

// FAC, eq. 7, in two passes: the new maximum first, then weights. Scores beyond the state's maximum rescale it.
void attend(const fasa_kv & kv, const float * q, const int32_t * cells, int64_t n, float * m, float * d, float * o) {
    std::vector<float>  row(static_cast<size_t>(std::max(kv.k_dim, kv.v_dim)));
    std::vector<double> logits(static_cast<size_t>(n));
    double              top = *m;
    for (int64_t i = 0; i < n; ++i) {
        kv_to_float(kv.k_type, static_cast<const uint8_t *>(kv.k) + cells[i] * kv.k_stride, kv.k_dim, row.data());
        double dot = 0;
        for (int32_t j = 0; j < kv.k_dim; ++j) {
            dot += static_cast<double>(q[j]) * row[j];
        }
        logits[i] = kv.softcap != 0.0f ? kv.softcap * std::tanh(dot * kv.scale / kv.softcap) : dot * kv.scale;
        logits[i] += kv.mask != nullptr ? half_to_float(kv.mask[cells[i]]) : 0.0f;
        top = std::max(top, logits[i]);
    }
    if (!(top > -std::numeric_limits<double>::infinity())) {
        return; // nothing visible so far
    }
    const double        old = std::exp(*m - top);
    double              sum = *d * old;
    std::vector<double> acc(o, o + kv.v_dim);
    for (double & x : acc) {
        x *= old;
    }
    for (int64_t i = 0; i < n; ++i) {
        const double weight = std::exp(logits[i] - top);
        kv_to_float(kv.v_type, static_cast<const uint8_t *>(kv.v) + cells[i] * kv.v_stride, kv.v_dim, row.data());
        sum += weight;
        for (int32_t j = 0; j < kv.v_dim; ++j) {
            acc[j] += weight * row[j];
        }
    }
    *m = static_cast<float>(top);
    *d = static_cast<float>(sum);
    std::copy(acc.begin(), acc.end(), o);
}

} // namespace

const Kernels kReference = {score, select, attend};

} // namespace fasa
