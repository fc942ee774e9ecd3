#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "clock.h"
#include "hadamard.h"
#include "half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fasa {

namespace {

// Adds the time since the last call to one stage, on thread 0 only.
class StageClock {
  public:
    explicit StageClock(bool on) : on_(on), last_(on ? now_ns() : 0) {}
    void to(int64_t & stage) {
        if (on_) {
            const int64_t now = now_ns();
            stage += now - last_;
            last_ = now;
        }
    }

  private:
    bool    on_;
    int64_t last_;
};

struct State {
    float * m;
    float * d;
    float * o;
};

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

// ---- the stages on parts of the work -------------------------------------------------------------------------

void refresh_part(const NodeWork & w, const SideIndex::Part & part, StageClock & clock) {
    const int64_t n = w.index->refresh(part);
    if (part.h0 == 0 && part.h1 > 0) { // a cell counts once, whatever threads share its heads
        *w.n_indexed += n;
    }
    if (w.config->verify != 0) {
        *w.n_verify_failures += w.index->verify(part);
    }
    clock.to(w.timings->index);
}

// Rows have blocks of their own number and threads may be at different rows: the KV heads' places are the same for all
// rows, and inside one the group's query heads follow each other as the kernel wants them.
int64_t place_of(const NodeWork & w, const Row & row, int64_t head) {
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

void score_part(const NodeWork & w, const Row & row, const SideIndex::Part & part, StageClock & clock) {
    const int64_t n_block = row.visible->n_block;
    const int32_t group   = w.plan.n_head / w.plan.n_head_kv;
    const int64_t b1      = std::min(part.b1, n_block);
    for (int32_t h = part.h0; h < part.h1 && part.b0 < b1; ++h) {
        const Layout & layout = w.index->layout(h);
        float          q[FASA_MAX_GROUP * FASA_MAX_HEAD_DIM];
        for (int32_t i = 0; i < group; ++i) {
            rope_query(w, h * group + i, row, q + i * layout.head_dim);
        }
        w.kernels->score(layout, q, group, w.index->blocks(part.stream, h), row.visible->words.data(), n_block, part.b0,
                         b1, scores_of(w, row, h * group), peaks_of(w, row, h * group));
    }
    clock.to(w.timings->score);
}

int64_t list_visible(const Visible & visible, int32_t * cells) {
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

// ---- how threads share a row -----------------------------------------------------------------------------------

// Whole tasks per thread when at most a fifth of the threads' time would be spent waiting for the last one.
bool divides_well(int n_task, int nth) {
    const int rounds = (n_task + nth - 1) / nth;
    return rounds * nth * 4 <= n_task * 5;
}

// select and attend for heads h0 <= h < h1; the result is written.
void run_heads(const NodeWork & w, const Row & row, int64_t h0, int64_t h1, StageClock & clock) {
    for (int64_t h = h0; h < h1; ++h) {
        select_head(w, row, h);
        clock.to(w.timings->select);
        attend_part(w, row, h, 0, 1);
        finish(w, state_of(w, h, 0), h, row);
        clock.to(w.timings->attend);
    }
}

// Fewer heads than threads: parts of each head's selection, merged at the end.
void run_splits(const NodeWork & w, const Row & row, int ith, int nth, int64_t h0, int64_t h1, StageClock & clock) {
    const int n_split = std::min(Scratch::kMaxSplits, std::max(2, (2 * nth + w.plan.n_head - 1) / w.plan.n_head));
    for (int64_t h = h0; h < h1; ++h) {
        select_head(w, row, h);
    }
    clock.to(w.timings->select);
    w.barrier->wait(nth);
    clock.to(w.timings->wait);
    for (int task = ith; task < w.plan.n_head * n_split; task += nth) {
        attend_part(w, row, task / n_split, task % n_split, n_split);
    }
    clock.to(w.timings->attend);
    w.barrier->wait(nth);
    clock.to(w.timings->wait);
    for (int64_t h = h0; h < h1; ++h) {
        const State s = state_of(w, h, 0);
        for (int split = 1; split < n_split; ++split) {
            merge(s, state_of(w, h, split), w.node->ne[0]);
        }
        finish(w, s, h, row);
    }
    clock.to(w.timings->attend);
}

// A thread's share: KV heads whole when they divide well, which needs no barrier and keeps a head's scores in its
// thread's cache; else a range of blocks of all heads, then a range of query heads.
struct Share {
    bool            whole_kv_heads;
    SideIndex::Part part;
    int64_t         h0, h1; // query heads
};

Share share_of(const NodeWork & w, int64_t stream, int ith, int nth) {
    const int32_t n_head    = w.plan.n_head;
    const int32_t n_head_kv = w.plan.n_head_kv;
    const int64_t n_block   = w.plan.n_block[stream];
    const int64_t at        = w.plan.first_stream + stream;
    if (divides_well(n_head_kv, nth)) {
        const int32_t k0    = n_head_kv * ith / nth;
        const int32_t k1    = n_head_kv * (ith + 1) / nth;
        const int64_t group = n_head / n_head_kv;
        return {true, {at, 0, n_block, k0, k1}, k0 * group, k1 * group};
    }
    return {false,
            {at, n_block * ith / nth, n_block * (ith + 1) / nth, 0, n_head_kv},
            static_cast<int64_t>(n_head) * ith / nth,
            static_cast<int64_t>(n_head) * (ith + 1) / nth};
}

void run_row(const NodeWork & w, const Row & row, const Share & share, int ith, int nth, StageClock & clock) {
    if (!row.attend_all) {
        score_part(w, row, share.part, clock);
    }
    if (!share.whole_kv_heads) {
        w.barrier->wait(nth);
        clock.to(w.timings->wait);
    }
    if (share.whole_kv_heads || divides_well(w.plan.n_head, nth)) {
        run_heads(w, row, share.h0, share.h1, clock);
    } else {
        run_splits(w, row, ith, nth, share.h0, share.h1, clock);
    }
    int64_t n = 0;
    for (int64_t h = share.h0; h < share.h1; ++h) {
        n += w.scratch->n_selected[h];
    }
    const fasa_kv kv = kv_of(w, 0, row);
    *w.n_attended += n;
    *w.bytes_attended += n * (kv_row_bytes(kv.k_type, kv.k_dim) + kv_row_bytes(kv.v_type, kv.v_dim));
}

void run_sparse(const NodeWork & w, int ith, int nth) {
    StageClock clock(ith == 0);
    int64_t    stream = -1;
    for (const Row & row : w.plan.rows) {
        const Share share = share_of(w, row.stream, ith, nth);
        if (row.stream != stream) {
            stream = row.stream;
            refresh_part(w, share.part, clock);
        }
        run_row(w, row, share, ith, nth, clock);
        if (!share.whole_kv_heads && &row != &w.plan.rows.back()) { // the next row overwrites all scores
            w.barrier->wait(nth);
            clock.to(w.timings->wait);
        }
    }
}

// Exact attention of every row over all its visible cells, and a copy of the queries.
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

} // namespace

void SpinBarrier::wait(int n_threads) {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
        if (spins > 20000) { // about 0.3 ms: somebody else has the core
            std::this_thread::yield();
            continue;
        }
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
}

void Scratch::reserve(int64_t heads, int64_t blocks) {
    if (heads <= n_head && blocks <= n_block) {
        return;
    }
    const int64_t head = std::max(heads, n_head);
    // n_kv grows by 256 cells at a time; growing by a quarter spares most of the reallocations.
    const int64_t block = blocks <= n_block ? n_block : std::max(blocks, n_block + n_block / 4);
    n_head = n_block = 0;
    scores           = make_aligned<float>(head * block * FASA_BLOCK_CELLS);
    peaks            = make_aligned<float>(head * block * FASA_PEAKS);
    values           = make_aligned<float>(head * block * FASA_BLOCK_CELLS);
    cells            = make_aligned<int32_t>(head * block * FASA_BLOCK_CELLS);
    states           = make_aligned<float>(head * kMaxSplits * (2 + FASA_MAX_HEAD_DIM));
    n_selected.assign(head, 0);
    n_head  = head;
    n_block = block;
}

void run_node(ggml_tensor *, int ith, int nth, void * userdata) {
    const auto & w = *static_cast<const NodeWork *>(userdata);
    if (w.captured != nullptr) {
        run_capture(w, ith, nth);
    } else {
        run_sparse(w, ith, nth);
    }
}

} // namespace fasa
