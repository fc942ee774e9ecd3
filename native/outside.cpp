#include "outside.h"

#include <algorithm>
#include <vector>

#include "half.h"
#include "row_stages.h"

namespace fasa {

void run_capture(const NodeWork & w, int ith, int nth) {
    const int64_t n_rows = w.node->src[0]->ne[1];
    const int64_t n_kv   = w.plan.k->ne[1];
    const int64_t dim    = w.node->src[0]->ne[0];
    for (int64_t h = ith; h < w.plan.n_head; h += nth) {
        int32_t * cells = w.scratch->cells.get() + h * w.scratch->n_block * FASA_BLOCK_CELLS;
        for (int64_t r = 0; r < n_rows; ++r) {
            const Row     row = {0, r, nullptr, true};
            const fasa_kv kv  = kv_of(w, h, row);
            int64_t       n   = 0;
            for (int32_t c = 0; c < n_kv; ++c) {
                cells[n] = c;
                n += kv.mask[c] != kHalfMinusInf ? 1 : 0;
            }
            const State s = state_of(w, h, 0);
            clear(s, w.node->ne[0]);
            w.kernels->attend(kv, query(w, h, row), cells, n, s.m, s.d, s.o);
            finish(w, s, h, row);
            rope_query(w, h, row, w.captured + (r * w.plan.n_head + h) * dim);
        }
    }
}

namespace {

// Hidden cells get -inf, whatever the scorer wrote; peaks as score would have left them.
void hide_and_find_peaks(const Visible & visible, float * scores, float * peaks) {
    for (int64_t b = 0; b < visible.n_block; ++b) {
        float * peak = peaks + b * FASA_PEAKS;
        std::fill(peak, peak + FASA_PEAKS, kHidden);
        for (int64_t c = 0; c < FASA_BLOCK_CELLS; ++c) {
            float & score        = scores[b * FASA_BLOCK_CELLS + c];
            score                = (visible.words[b] >> c & 1u) != 0 ? score : kHidden;
            peak[c % FASA_PEAKS] = std::max(peak[c % FASA_PEAKS], score);
        }
    }
}

// False when the scorer failed.
bool score_row(const NodeWork & w, const Row & row, int64_t first_changed) {
    const auto         head_dim = static_cast<int32_t>(w.plan.k->ne[0]);
    const int64_t      n_score  = row.visible->n_block * FASA_BLOCK_CELLS;
    const int64_t      stream   = w.plan.first_stream + row.stream;
    std::vector<float> queries(static_cast<size_t>(w.plan.n_head) * head_dim);
    std::vector<float> scores(static_cast<size_t>(w.plan.n_head * n_score), kHidden);
    for (int64_t h = 0; h < w.plan.n_head; ++h) {
        rope_query(w, h, row, queries.data() + h * head_dim);
    }
    fasa_scoring call;
    call.layer         = w.plan.layer;
    call.head_dim      = head_dim;
    call.n_head        = w.plan.n_head;
    call.n_head_kv     = w.plan.n_head_kv;
    call.n_block       = row.visible->n_block;
    call.n_cell        = std::min(n_score, w.index->n_cell());
    call.first_changed = first_changed;
    call.q             = queries.data();
    call.keys          = w.index->keys(stream, 0);
    call.key_stride    = w.index->keys(stream, 1) - call.keys;
    call.visible       = row.visible->words.data();
    call.scores        = scores.data();
    if (w.scorer(w.scorer_user, &call) != 0) {
        return false;
    }
    for (int64_t h = 0; h < w.plan.n_head; ++h) {
        float * own = scores_of(w, row, h);
        std::copy_n(scores.data() + h * n_score, n_score, own);
        hide_and_find_peaks(*row.visible, own, peaks_of(w, row, h));
    }
    return true;
}

} // namespace

void run_scored(const NodeWork & w, int ith) {
    if (ith != 0) {
        return;
    }
    int64_t stream = -1;
    for (Row row : w.plan.rows) {
        const int64_t n_block       = w.plan.n_block[row.stream];
        const int64_t at            = w.plan.first_stream + row.stream;
        int64_t       first_changed = w.index->n_cell();
        if (row.stream != stream) {
            stream        = row.stream;
            first_changed = w.index->first_dirty(at, n_block);
            *w.n_indexed += w.index->refresh({at, 0, n_block, 0, w.plan.n_head_kv});
        }
        row.attend_all = row.attend_all || !score_row(w, row, first_changed);
        for (int64_t h = 0; h < w.plan.n_head; ++h) {
            select_head(w, row, h);
            attend_part(w, row, h, 0, 1);
            finish(w, state_of(w, h, 0), h, row);
            *w.n_attended += w.scratch->n_selected[h];
        }
    }
}

} // namespace fasa
