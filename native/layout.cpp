#include "layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "status.h"

namespace fasa {

namespace {

struct Codes {
    uint8_t step; // of step_code
    uint8_t u[kMaxSlots];
};

void round_codes(const float * x, int32_t n, int32_t bits, float step, uint8_t * u) {
    const float top    = static_cast<float>((1 << bits) - 1);
    const float middle = 0.5f * top;
    const float inv    = step > 0.0f ? 1.0f / step : 0.0f;
    for (int32_t i = 0; i < n; ++i) {
        const float level = std::nearbyint(x[i] * inv + middle);
        // constant first: std::max(0, NaN) is 0
        u[i] = static_cast<uint8_t>(std::min(top, std::max(0.0f, level)));
    }
}

// 4 and 8 bits: the least step that reaches the largest value.
void quantize_finely(const float * x, int32_t n, int32_t bits, Codes * out) {
    float peak = 0.0f;
    for (int32_t i = 0; i < n; ++i) {
        peak = std::max(peak, std::fabs(x[i]));
    }
    out->step = step_code(peak / (0.5f * static_cast<float>((1 << bits) - 1)), true);
    round_codes(x, n, bits, step_value(out->step), out->u);
}

// 1 and 2 bits: codes by the spread of the values, then the step that keeps the entry's projection on the key,
// sum(x x) / sum(x l). Least squares would shrink what fits badly, and rank cells by how well they fit.
void quantize_coarsely(const float * x, int32_t n, int32_t bits, Codes * out) {
    float square = 0.0f;
    for (int32_t i = 0; i < n; ++i) {
        square += x[i] * x[i];
    }
    round_codes(x, n, bits, kGaussStep2 * std::sqrt(square / static_cast<float>(n)), out->u);
    float xl = 0.0f;
    for (int32_t i = 0; i < n; ++i) {
        xl += x[i] * (static_cast<float>(out->u[i]) - 0.5f * static_cast<float>((1 << bits) - 1));
    }
    out->step = step_code(xl > 0.0f ? square / xl : 0.0f);
}

void check_shape(int32_t head_dim, int32_t n_rot, int32_t rope) {
    if (head_dim < 2 || head_dim > FASA_MAX_HEAD_DIM || head_dim % 2 != 0) {
        fail(FASA_STATUS_ARGUMENT, "head_dim is %d; it must be even, from 2 to %d.", head_dim, FASA_MAX_HEAD_DIM);
    }
    if (n_rot < 2 || n_rot > head_dim || n_rot % 2 != 0) {
        fail(FASA_STATUS_ARGUMENT, "n_rot is %d; it must be even, from 2 to head_dim = %d.", n_rot, head_dim);
    }
    if (rope != FASA_ROPE_NORM && rope != FASA_ROPE_NEOX) {
        fail(FASA_STATUS_ARGUMENT, "Rope type %d is unknown; only NORM (0) and NEOX (2) have frequency chunks.", rope);
    }
}

} // namespace

Layout::Layout(int32_t head_dim, int32_t n_rot, int32_t rope, int32_t n_fc, const uint16_t * fc, const uint8_t * bits,
               const float * center, const float * scale)
    : head_dim(head_dim) {
    check_shape(head_dim, n_rot, rope);
    if (n_fc < 1 || n_fc > head_dim / 2) {
        fail(FASA_STATUS_ARGUMENT, "n_fc is %d; a head of %d dims has 1 to %d chunks.", n_fc, head_dim, head_dim / 2);
    }
    bool seen[FASA_MAX_HEAD_DIM / 2] = {};
    for (int32_t i = 0; i < n_fc; ++i) {
        if (fc[i] >= head_dim / 2 || seen[fc[i]]) {
            fail(FASA_STATUS_ARGUMENT, "Chunk %d is %s; ids must be different and below head_dim / 2 = %d.", fc[i],
                 fc[i] >= head_dim / 2 ? "out of range" : "listed twice", head_dim / 2);
        }
        if (!width_exists(bits[i])) {
            fail(FASA_STATUS_ARGUMENT, "Chunk %d has %d bits; 1, 2, 4 and 8 exist.", fc[i], bits[i]);
        }
        seen[fc[i]] = true;
    }
    for (const int32_t width : kWidths) {
        const int32_t first = n_slot();
        for (int32_t i = 0; i < n_fc; ++i) {
            if (bits[i] != width) {
                continue;
            }
            const bool    split = rope == FASA_ROPE_NEOX && fc[i] < n_rot / 2;
            const int32_t d0    = split ? fc[i] : 2 * fc[i];
            const int32_t d1    = split ? fc[i] + n_rot / 2 : 2 * fc[i] + 1;
            dims.insert(dims.end(), {d0, d1});
        }
        if (n_slot() == first) {
            continue;
        }
        const int32_t unit = width == 1 ? 8 : 4;
        dims.resize(first + (n_slot() - first + unit - 1) / unit * unit, kNoDim);
        const int32_t n_quad = (n_slot() - first) / 4;
        segments.push_back({width, n_quad, first, block_bytes});
        block_bytes += kStepsBytes + n_quad * quad_bytes(width);
    }
    for (const int32_t d : dims) {
        const float s = d != kNoDim && scale != nullptr ? scale[d] : 1.0f;
        const float c = d != kNoDim && center != nullptr ? center[d] : 0.0f;
        if (!(s > 0.0f) || !std::isfinite(s) || !std::isfinite(c)) {
            fail(FASA_STATUS_ARGUMENT, "Channel %d has center %g and scale %g; they must be finite, the scale above 0.",
                 d, static_cast<double>(c), static_cast<double>(s));
        }
        this->center.push_back(c);
        this->scale.push_back(s);
    }
}

void Layout::write(const float * key, uint8_t * block, int32_t cell) const {
    for (const Segment & segment : segments) {
        const int32_t n = 4 * segment.n_quad;
        float         x[kMaxSlots];
        int32_t       n_used = n;
        for (int32_t i = 0; i < n; ++i) {
            const int32_t slot = segment.slot + i;
            if (dims[slot] == kNoDim) { // padding is at the end of a segment
                n_used = i;
                break;
            }
            x[i] = (key[dims[slot]] - center[slot]) / scale[slot];
        }
        Codes codes;
        (segment.bits >= 4 ? quantize_finely : quantize_coarsely)(x, n_used, segment.bits, &codes);
        uint8_t * steps     = block + segment.offset;
        steps[cell]         = codes.step;
        const uint32_t mask = (1u << segment.bits) - 1u;
        for (int32_t i = 0; i < n; ++i) {
            const CodePlace at   = code_place(segment.bits, i, cell);
            uint8_t *       byte = steps + kStepsBytes + at.byte;
            const uint32_t  code = i < n_used ? codes.u[i] : 0u;
            *byte                = static_cast<uint8_t>((*byte & ~(mask << at.shift)) | (code << at.shift));
        }
    }
}

void ScoreQuery::prepare(const Layout & layout, const float * q) {
    for (size_t s = 0; s < layout.segments.size(); ++s) {
        const Segment & segment = layout.segments[s];
        const int32_t   first   = segment.slot;
        const int32_t   n       = 4 * segment.n_quad;
        float           x[kMaxSlots];
        float           peak = 0.0f;
        for (int32_t i = 0; i < n; ++i) {
            const int32_t d = layout.dims[first + i];
            x[i]            = d == Layout::kNoDim ? 0.0f : q[d] * layout.scale[first + i];
            peak            = std::max(peak, std::fabs(x[i]));
        }
        const float levels = static_cast<float>(query_levels(segment.bits));
        const float inv    = peak > 0.0f ? levels / peak : 0.0f;
        int32_t     sum    = 0;
        for (int32_t i = 0; i < n; ++i) {
            const float code = std::min(levels, std::max(-levels, std::nearbyint(x[i] * inv)));
            codes[first + i] = static_cast<int8_t>(code);
            sum += codes[first + i];
        }
        step[s] = peak / levels;
        bias[s] = step[s] * static_cast<float>(sum) * 0.5f * static_cast<float>((1 << segment.bits) - 1);
    }
}

} // namespace fasa
