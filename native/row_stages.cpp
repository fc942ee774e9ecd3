#include "row_stages.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "hadamard.h"

namespace fasa {

State state_of(const NodeWork & w, int64_t head, int split) {
    float * p = w.scratch->states.get() + (head * Scratch::kMaxSplits + split) * (2 + FASA_MAX_HEAD_DIM);
    return {p, p + 1, p + 2};
}

void clear(const State & s, int64_t v_dim) {
    *s.m = kHidden;
    *s.d = 0.0f;
    std::fill(s.o, s.o + v_dim, 0.0f);
}

// Two states with maxima a and b: weights exp(a - max) and exp(b - max). An empty state has m = -inf, d = 0 and adds
// nothing; two empty states must not compute exp(-inf - -inf).
void merge(const State & into, const State & from, int64_t v_dim) {
    if (*from.m == kHidden) {
        return;
    }
    const float top = std::max(*into.m, *from.m);
    const float a   = std::exp(*into.m - top);
    const float b   = std::exp(*from.m - top);
    *into.m         = top;
    *into.d         = *into.d * a + *from.d * b;
    for (int64_t i = 0; i < v_dim; ++i) {
        into.o[i] = into.o[i] * a + from.o[i] * b;
    }
}

// A sink is a logit without a value: it only adds to the denominator.
void finish(const NodeWork & w, const State & s, int64_t head, const Row & row) {
    const int64_t       v_dim = w.node->ne[0];
    const ggml_tensor * sinks = w.node->src[4];
    if (sinks != nullptr) {
        const float logit = static_cast<const float *>(sinks->data)[head];
        const float top   = std::max(*s.m, logit);
        const float old   = std::exp(*s.m - top);
        *s.d              = *s.d * old + std::exp(logit - top);
        for (int64_t i = 0; i < v_dim; ++i) {
            s.o[i] *= old;
        }
    }
    const float inv = *s.d == 0.0f ? 0.0f : 1.0f / *s.d;
    auto *      out = reinterpret_cast<float *>(static_cast<char *>(w.node->data) + head * w.node->nb[1] +
                                                row.row * w.node->nb[2] + row.stream * w.node->nb[3]);
    for (int64_t i = 0; i < v_dim; ++i) {
        out[i] = s.o[i] * inv;
    }
}

const float * query(const NodeWork & w, int64_t head, const Row & row) {
    const ggml_tensor * q = w.node->src[0];
    return reinterpret_cast<const float *>(static_cast<const char *>(q->data) + row.row * q->nb[1] + head * q->nb[2] +
                                           row.stream * q->nb[3]);
}

// Query in the basis in which RoPE acts.
void rope_query(const NodeWork & w, int64_t head, const Row & row, float * out) {
    const int32_t dim = static_cast<int32_t>(w.node->src[0]->ne[0]);
    std::memcpy(out, query(w, head, row), sizeof(float) * dim);
    undo_rotation(out, dim, w.plan.rotation);
}

fasa_kv kv_of(const NodeWork & w, int64_t head, const Row & row) {
    const ggml_tensor * k     = w.plan.k;
    const ggml_tensor * v     = w.plan.v;
    const ggml_tensor * mask  = w.node->src[3];
    const int64_t       group = w.plan.n_head / w.plan.n_head_kv;
    fasa_kv             kv;
    kv.k        = static_cast<const char *>(k->data) + head / group * k->nb[2] + row.stream * k->nb[3];
    kv.v        = static_cast<const char *>(v->data) + head / group * v->nb[2] + row.stream * v->nb[3];
    kv.k_stride = static_cast<int64_t>(k->nb[1]);
    kv.v_stride = static_cast<int64_t>(v->nb[1]);
    kv.k_type   = k->type;
    kv.v_type   = v->type;
    kv.k_dim    = static_cast<int32_t>(k->ne[0]);
    kv.v_dim    = static_cast<int32_t>(v->ne[0]);
    kv.scale    = w.scale;
    kv.softcap  = w.softcap;
    kv.mask     = reinterpret_cast<const uint16_t *>(static_cast<const char *>(mask->data) + row.row * mask->nb[1] +
                                                     row.stream * mask->nb[3]);
    return kv;
}

// Rows have blocks of their own number and threads may be at different rows: the KV heads' places are the same for all
// rows, and inside one the group's query heads follow each other as the kernel wants them.
static int64_t place_of(const NodeWork & w, const Row & row, int64_t head) {
    const int64_t group = w.plan.n_head / w.plan.n_head_kv;
    return head / group * group * w.scratch->n_block + head % group * row.visible->n_block;
}

float * scores_of(const NodeWork & w, const Row & row, int64_t head) {
    return w.scratch->scores.get() + place_of(w, row, head) * FASA_BLOCK_CELLS;
}

float * peaks_of(const NodeWork & w, const Row & row, int64_t head) {
    return w.scratch->peaks.get() + place_of(w, row, head) * FASA_PEAKS;
}

int32_t * cells_of(const NodeWork & w, int64_t head) {
    return w.scratch->cells.get() + head * w.scratch->n_block * FASA_BLOCK_CELLS;
}

static int64_t list_visible(const Visible & visible, int32_t * cells) {
    int64_t n = 0;
    for (int64_t b = 0; b < visible.n_block; ++b) {
        for (uint64_t bits = visible.words[b]; bits != 0; bits &= bits - 1) {
            cells[n++] = static_cast<int32_t>(b * FASA_BLOCK_CELLS + __builtin_ctzll(bits));
        }
    }
    return n;
}

void select_head(const NodeWork & w, const Row & row, int64_t head) {
    int32_t * cells = cells_of(w, head);
    if (row.attend_all) {
        w.scratch->n_selected[head] = list_visible(*row.visible, cells);
        return;
    }
    float * scores = scores_of(w, row, head);
    float * peaks  = peaks_of(w, row, head);
    for (const int32_t cell : row.visible->forced) {
        scores[cell]                                                    = std::numeric_limits<float>::max();
        peaks[cell / FASA_BLOCK_CELLS * FASA_PEAKS + cell % FASA_PEAKS] = std::numeric_limits<float>::max();
    }
    w.scratch->n_selected[head] =
        w.kernels->select(scores, peaks, row.visible->n_block, w.config->budget,
                          w.scratch->values.get() + head * w.scratch->n_block * FASA_BLOCK_CELLS, cells);
}

// attend for one of `n_split` equal parts of a head's selection.
void attend_part(const NodeWork & w, const Row & row, int64_t head, int split, int n_split) {
    const int64_t n     = w.scratch->n_selected[head];
    const int64_t first = n * split / n_split;
    const int64_t last  = n * (split + 1) / n_split;
    const State   s     = state_of(w, head, split);
    clear(s, w.node->ne[0]);
    w.kernels->attend(kv_of(w, head, row), query(w, head, row), cells_of(w, head) + first, last - first, s.m, s.d, s.o);
}

} // namespace fasa
