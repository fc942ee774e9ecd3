#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "clock.h"
#include "hadamard.h"

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
void finish(const NodeWork & w, const State & s, int64_t head, int64_t row) {
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
    auto *      out =
        reinterpret_cast<float *>(static_cast<char *>(w.node->data) + head * w.node->nb[1] + row * w.node->nb[2]);
    for (int64_t i = 0; i < v_dim; ++i) {
        out[i] = s.o[i] * inv;
    }
}

const float * query(const NodeWork & w, int64_t head, int64_t row) {
    const ggml_tensor * q = w.node->src[0];
    return reinterpret_cast<const float *>(static_cast<const char *>(q->data) + row * q->nb[1] + head * q->nb[2]);
}

// Query in the basis in which RoPE acts.
void rope_query(const NodeWork & w, int64_t head, int64_t row, float * out) {
    const int32_t dim = static_cast<int32_t>(w.node->src[0]->ne[0]);
    std::memcpy(out, query(w, head, row), sizeof(float) * dim);
    undo_rotation(out, dim, w.plan.rotation);
}

fasa_kv kv_of(const NodeWork & w, int64_t head, int64_t row) {
    const ggml_tensor * k     = w.node->src[1];
    const ggml_tensor * v     = w.node->src[2];
    const ggml_tensor * mask  = w.node->src[3];
    const int64_t       group = w.plan.n_head / w.plan.n_head_kv;
    fasa_kv             kv;
    kv.k        = static_cast<const char *>(k->data) + head / group * k->nb[2];
    kv.v        = static_cast<const char *>(v->data) + head / group * v->nb[2];
    kv.k_stride = static_cast<int64_t>(k->nb[1]);
    kv.v_stride = static_cast<int64_t>(v->nb[1]);
    kv.k_type   = k->type;
    kv.v_type   = v->type;
    kv.k_dim    = static_cast<int32_t>(k->ne[0]);
    kv.v_dim    = static_cast<int32_t>(v->ne[0]);
    kv.scale    = w.scale;
    kv.softcap  = w.softcap;
    kv.mask     = reinterpret_cast<const uint16_t *>(static_cast<const char *>(mask->data) + row * mask->nb[1]);
    return kv;
}

// score for a part of the index, after that part is up to date.
void score_part(const NodeWork & w, const SideIndex::Part & part, StageClock & clock) {
    const int64_t n = w.index->refresh(part);
    if (n > 0 && part.h0 == 0) { // a cell counts once, whatever threads share its heads
        *w.n_indexed += n;
    }
    if (w.config->verify != 0) {
        *w.n_verify_failures += w.index->verify(part);
    }
    clock.to(w.timings->index);
    const int64_t n_block = w.plan.visible->n_block;
    const int32_t group   = w.plan.n_head / w.plan.n_head_kv;
    for (int32_t h = part.h0; h < part.h1; ++h) {
        const Layout & layout = w.index->layout(h);
        float          q[FASA_MAX_GROUP * FASA_MAX_HEAD_DIM];
        for (int32_t i = 0; i < group; ++i) {
            rope_query(w, h * group + i, 0, q + i * layout.head_dim);
        }
        w.kernels->score(layout, q, group, w.index->blocks(h), w.plan.visible->words.data(), n_block, part.b0, part.b1,
                         w.scratch->scores.get() + h * group * n_block * FASA_BLOCK_CELLS,
                         w.scratch->peaks.get() + h * group * n_block * FASA_PEAKS);
    }
    clock.to(w.timings->score);
}

void select_head(const NodeWork & w, int64_t head) {
    const int64_t n_block = w.plan.visible->n_block;
    const int64_t n_cell  = n_block * FASA_BLOCK_CELLS;
    float *       scores  = w.scratch->scores.get() + head * n_cell;
    float *       peaks   = w.scratch->peaks.get() + head * n_block * FASA_PEAKS;
    for (const int32_t cell : *w.forced) {
        scores[cell]                                                    = std::numeric_limits<float>::max();
        peaks[cell / FASA_BLOCK_CELLS * FASA_PEAKS + cell % FASA_PEAKS] = std::numeric_limits<float>::max();
    }
    w.scratch->n_selected[head] =
        w.kernels->select(scores, peaks, n_block, w.config->budget, w.scratch->values.get() + head * n_cell,
                          w.scratch->cells.get() + head * n_cell);
}

// attend for one of `n_split` equal parts of a head's selection.
void attend_part(const NodeWork & w, int64_t head, int split, int n_split) {
    const int64_t   n     = w.scratch->n_selected[head];
    const int64_t   first = n * split / n_split;
    const int64_t   last  = n * (split + 1) / n_split;
    const int32_t * cells = w.scratch->cells.get() + head * w.plan.visible->n_block * FASA_BLOCK_CELLS;
    const State     s     = state_of(w, head, split);
    clear(s, w.node->ne[0]);
    w.kernels->attend(kv_of(w, head, 0), query(w, head, 0), cells + first, last - first, s.m, s.d, s.o);
}

// Whole tasks per thread when at most a fifth of the threads' time would be spent waiting for the last one.
bool divides_well(int n_task, int nth) {
    const int rounds = (n_task + nth - 1) / nth;
    return rounds * nth * 4 <= n_task * 5;
}

// select and attend for heads h0 <= h < h1; the result is written.
void run_heads(const NodeWork & w, int64_t h0, int64_t h1, StageClock & clock) {
    for (int64_t h = h0; h < h1; ++h) {
        select_head(w, h);
        clock.to(w.timings->select);
        attend_part(w, h, 0, 1);
        finish(w, state_of(w, h, 0), h, 0);
        clock.to(w.timings->attend);
    }
}

// Fewer heads than threads: parts of each head's selection, merged at the end.
void run_splits(const NodeWork & w, int ith, int nth, int64_t h0, int64_t h1, StageClock & clock) {
    const int n_split = std::min(Scratch::kMaxSplits, std::max(2, (2 * nth + w.plan.n_head - 1) / w.plan.n_head));
    for (int64_t h = h0; h < h1; ++h) {
        select_head(w, h);
    }
    clock.to(w.timings->select);
    w.barrier->wait(nth);
    clock.to(w.timings->wait);
    for (int task = ith; task < w.plan.n_head * n_split; task += nth) {
        attend_part(w, task / n_split, task % n_split, n_split);
    }
    clock.to(w.timings->attend);
    w.barrier->wait(nth);
    clock.to(w.timings->wait);
    for (int64_t h = h0; h < h1; ++h) {
        const State s = state_of(w, h, 0);
        for (int split = 1; split < n_split; ++split) {
            merge(s, state_of(w, h, split), w.node->ne[0]);
        }
        finish(w, s, h, 0);
    }
    clock.to(w.timings->attend);
}

void run_sparse(const NodeWork & w, int ith, int nth) {
    StageClock    clock(ith == 0);
    const int64_t n_block   = w.plan.visible->n_block;
    const int32_t n_head_kv = w.plan.n_head_kv;
    int64_t       h0        = static_cast<int64_t>(w.plan.n_head) * ith / nth;
    int64_t       h1        = static_cast<int64_t>(w.plan.n_head) * (ith + 1) / nth;
    if (divides_well(n_head_kv, nth)) { // no barrier, and a head's scores stay in its thread's cache
        const SideIndex::Part part = {0, n_block, n_head_kv * ith / nth, n_head_kv * (ith + 1) / nth};
        score_part(w, part, clock);
        h0 = static_cast<int64_t>(part.h0) * (w.plan.n_head / n_head_kv);
        h1 = static_cast<int64_t>(part.h1) * (w.plan.n_head / n_head_kv);
        run_heads(w, h0, h1, clock);
    } else {
        score_part(w, {n_block * ith / nth, n_block * (ith + 1) / nth, 0, n_head_kv}, clock);
        w.barrier->wait(nth);
        clock.to(w.timings->wait);
        if (divides_well(w.plan.n_head, nth)) {
            run_heads(w, h0, h1, clock);
        } else {
            run_splits(w, ith, nth, h0, h1, clock);
        }
    }
    int64_t n = 0;
    for (int64_t h = h0; h < h1; ++h) {
        n += w.scratch->n_selected[h];
    }
    const fasa_kv kv = kv_of(w, 0, 0);
    *w.n_attended += n;
    *w.bytes_attended += n * (kv_row_bytes(kv.k_type, kv.k_dim) + kv_row_bytes(kv.v_type, kv.v_dim));
}

// Exact attention of every row over all its visible cells, and a copy of the queries.
void run_capture(const NodeWork & w, int ith, int nth) {
    const int64_t n_rows = w.node->src[0]->ne[1];
    const int64_t n_kv   = w.node->src[1]->ne[1];
    const int64_t dim    = w.node->src[0]->ne[0];
    for (int64_t h = ith; h < w.plan.n_head; h += nth) {
        int32_t * cells = w.scratch->cells.get() + h * w.scratch->n_block * FASA_BLOCK_CELLS;
        for (int64_t row = 0; row < n_rows; ++row) {
            const fasa_kv kv = kv_of(w, h, row);
            int64_t       n  = 0;
            for (int32_t c = 0; c < n_kv; ++c) {
                cells[n] = c;
                n += kv.mask[c] != 0xfc00u ? 1 : 0; // -inf
            }
            const State s = state_of(w, h, 0);
            clear(s, w.node->ne[0]);
            w.kernels->attend(kv, query(w, h, row), cells, n, s.m, s.d, s.o);
            finish(w, s, h, row);
            rope_query(w, h, row, w.captured + (row * w.plan.n_head + h) * dim);
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
