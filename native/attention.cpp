#include "attention.h"

#include <algorithm>
#include <thread>

#include "clock.h"
#include "outside.h"
#include "row_stages.h"

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

// ---- how threads share a row -----------------------------------------------------------------------------------

// Whole tasks per thread when at most a fifth of the threads' time would be spent waiting for the last one.
bool divides_well(int n_task, int nth) {
    const int rounds = (n_task + nth - 1) / nth;
    return rounds * nth * 4 <= n_task * 5;
}

// select and attend where there is one thread; the result is written.
void run_heads(const NodeWork & w, const Row & row, StageClock & clock) {
    for (int64_t h = 0; h < w.plan.n_head; ++h) {
        select_head(w, row, h);
        clock.to(w.timings->select);
        attend_part(w, row, h, 0, 1);
        finish(w, state_of(w, h, 0), h, row);
        clock.to(w.timings->attend);
    }
}

// A thread's share: KV heads whole when they divide well, which needs no barrier after score and keeps a head's scores
// in its thread's cache; else a range of the blocks of all heads, one head after the other, so that few heads' queries
// are prepared by several threads and a new cell is indexed by several; then a range of query heads to select for.
struct Share {
    bool    whole_kv_heads;
    int64_t stream, n_block; // none when all its rows attend all that they see
    int64_t first, last;     // KV heads; or blocks of KV head 0, of KV head 1, ...
    int64_t h0, h1;          // query heads

    // f(part) for as few parts as there can be.
    template <typename F> void for_parts(F && f) const {
        if (whole_kv_heads) {
            f({stream, 0, n_block, static_cast<int32_t>(first), static_cast<int32_t>(last)});
            return;
        }
        for (int64_t at = first; at < last;) {
            const int64_t h = at / n_block, end = std::min(last, (h + 1) * n_block);
            f({stream, at - h * n_block, end - h * n_block, static_cast<int32_t>(h), static_cast<int32_t>(h + 1)});
            at = end;
        }
    }
};

Share share_of(const NodeWork & w, int64_t stream, int ith, int nth) {
    const int64_t n_head = w.plan.n_head, n_head_kv = w.plan.n_head_kv, group = n_head / n_head_kv;
    const int64_t n_block = w.plan.n_block[stream], of_cache = w.plan.first_stream + stream;
    const auto    begin = [&](int64_t n, int thread) { return n * thread / nth; };
    if (divides_well(w.plan.n_head_kv, nth)) {
        const int64_t k0 = begin(n_head_kv, ith), k1 = begin(n_head_kv, ith + 1);
        return {true, of_cache, n_block, k0, k1, k0 * group, k1 * group};
    }
    const int64_t n = n_head_kv * n_block;
    return {false, of_cache, n_block, begin(n, ith), begin(n, ith + 1), begin(n_head, ith), begin(n_head, ith + 1)};
}

// Parts of each head's selection, merged at the end. A thread that is done with its own takes parts of others: cores
// are not equally fast, and those that wait are lost. Who does a part does not change the result. Behind the second
// barrier nobody needs scores or cells: the next row may overwrite them.
void run_splits(const NodeWork & w, const Row & row, const Share & share, int ith, int nth, StageClock & clock) {
    const int n_split = std::clamp((8 * nth + w.plan.n_head - 1) / w.plan.n_head, 2, Scratch::kMaxSplits);
    for (int64_t h = share.h0; h < share.h1; ++h) {
        select_head(w, row, h);
    }
    clock.to(w.timings->select);
    w.scratch->next[ith].part.store(0, std::memory_order_relaxed); // all have left the row before at its last barrier
    w.barrier->wait(nth);
    clock.to(w.timings->wait);
    for (int i = 0; i < nth; ++i) {
        const int   owner = (ith + i) % nth;
        const Share of    = share_of(w, row.stream, owner, nth);
        auto &      next  = w.scratch->next[owner].part;
        const auto  n     = static_cast<int>(of.h1 - of.h0) * n_split;
        for (int part = next.fetch_add(1); part < n; part = next.fetch_add(1)) {
            attend_part(w, row, of.h0 + part / n_split, part % n_split, n_split);
        }
    }
    clock.to(w.timings->attend);
    w.barrier->wait(nth);
    clock.to(w.timings->wait);
    for (int64_t h = share.h0; h < share.h1; ++h) {
        const State s = state_of(w, h, 0);
        for (int split = 1; split < n_split; ++split) {
            merge(s, state_of(w, h, split), w.node->ne[0]);
        }
        finish(w, s, h, row);
    }
    clock.to(w.timings->attend);
}

void run_row(const NodeWork & w, const Row & row, const Share & share, int ith, int nth, StageClock & clock) {
    if (!row.attend_all) {
        share.for_parts([&](const SideIndex::Part & part) { score_part(w, row, part, clock); });
    }
    if (!share.whole_kv_heads) {
        w.barrier->wait(nth);
        clock.to(w.timings->wait);
    }
    if (nth == 1) {
        run_heads(w, row, clock);
    } else {
        run_splits(w, row, share, ith, nth, clock);
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
            share.for_parts([&](const SideIndex::Part & part) { refresh_part(w, part, clock); });
        }
        run_row(w, row, share, ith, nth, clock);
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
    const auto & w     = *static_cast<const NodeWork *>(userdata);
    const int    limit = w.config->n_threads > 0 ? std::min(nth, w.config->n_threads) : nth;
    if (ith >= limit) { // ggml's barrier behind the node is where it waits for the others
        return;
    }
    nth = limit;
    if (w.captured != nullptr) {
        run_capture(w, ith, nth);
    } else if (w.scorer != nullptr) {
        run_scored(w, ith);
    } else {
        run_sparse(w, ith, nth);
    }
}

} // namespace fasa
