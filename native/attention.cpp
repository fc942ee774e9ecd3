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

// ---- how threads share a row -----------------------------------------------------------------------------------

// Waking up takes long: who waits gives its core away only after up to 0.1 ms. Where others want the core, the thread
// that is waited for may be one of them.
class Patience {
  public:
    void pause() {
        if (++spins_ > 2000) {
            std::this_thread::yield();
            return;
        }
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

  private:
    int spins_ = 0;
};

// One thread at a row's tasks: score for a chunk of a KV head's blocks, select for a query head when its KV head is
// scored, attend for a part of a selection, and whoever ends a head's last part merges them. A thread takes the tasks
// of its own share first, then others': cores are not equally fast, some begin late, and who waits is lost. Who does a
// task does not change the result.
class RowTasks {
  public:
    RowTasks(const NodeWork & w, const Row & row, bool refresh, int ith, int nth, StageClock & clock)
        : w_(w), row_(row), refresh_(refresh), ith_(ith), nth_(nth), clock_(clock), n_head_(w.plan.n_head),
          group_(w.plan.n_head / w.plan.n_head_kv), n_block_(w.plan.n_block[row.stream]), n_split_(splits(w, nth)) {}

    void run() {
        for (int i = 0; i < nth_; ++i) {
            score_share_of((ith_ + i) % nth_);
        }
        Patience patience;
        for (bool left = true; left;) {
            left     = false;
            bool any = false;
            for (int64_t i = 0, own = n_head_ * ith_ / nth_; i < n_head_; ++i) {
                const int64_t h = (own + i) % n_head_;
                any             = work_on(h) || any;
                left            = left || w_.scratch->heads[h].next.load(std::memory_order_relaxed) < n_split_;
            }
            if (left && !any) {
                patience.pause();
                clock_.to(w_.timings->wait);
            }
        }
        const fasa_kv kv = kv_of(w_, 0, row_);
        *w_.n_attended += n_attended_;
        *w_.bytes_attended += n_attended_ * (kv_row_bytes(kv.k_type, kv.k_dim) + kv_row_bytes(kv.v_type, kv.v_dim));
    }

  private:
    // Parts of a head's selection: some more than there are threads, so that the last ones end together.
    static int splits(const NodeWork & w, int nth) {
        const auto n_head = static_cast<int>(w.plan.n_head);
        return nth == 1 ? 1 : std::clamp((8 * nth + n_head - 1) / n_head, 2, Scratch::kMaxSplits);
    }

    // A thread's share of the blocks of KV head 0, of KV head 1, ..., in chunks that others may take.
    void score_share_of(int owner) {
        constexpr int64_t kChunks = 4, kFewest = 64; // each prepares the queries anew, so none is small
        const int64_t     n = w_.plan.n_head_kv * n_block_, first = n * owner / nth_, last = n * (owner + 1) / nth_;
        const int64_t     chunk = std::max((last - first + kChunks - 1) / kChunks, kFewest);
        auto &            taken = w_.scratch->shares[owner].taken;
        while (taken.load(std::memory_order_relaxed) * chunk < last - first) {
            const int64_t begin = first + taken.fetch_add(1, std::memory_order_relaxed) * chunk;
            for (int64_t at = begin, end = std::min(last, begin + chunk); at < end;) {
                const int64_t         h = at / n_block_, stop = std::min(end, (h + 1) * n_block_);
                const SideIndex::Part part = {w_.plan.first_stream + row_.stream, at - h * n_block_,
                                              stop - h * n_block_, static_cast<int32_t>(h),
                                              static_cast<int32_t>(h + 1)};
                if (refresh_) {
                    refresh(part);
                }
                if (!row_.attend_all) {
                    score(part);
                }
                w_.scratch->kv_heads[h].scored.fetch_add(stop - at, std::memory_order_release);
                at = stop;
            }
        }
    }

    // `part` is of one KV head.
    void refresh(const SideIndex::Part & part) {
        const int64_t n = w_.index->refresh(part);
        if (part.h0 == 0) { // a cell counts once, whatever threads share its heads
            *w_.n_indexed += n;
        }
        if (w_.config->verify != 0) {
            *w_.n_verify_failures += w_.index->verify(part);
        }
        clock_.to(w_.timings->index);
    }

    void score(const SideIndex::Part & part) {
        const int64_t n_block = row_.visible->n_block, b1 = std::min(part.b1, n_block), first_head = part.h0 * group_;
        if (part.b0 < b1) {
            const Layout & layout = w_.index->layout(part.h0);
            float          q[FASA_MAX_GROUP * FASA_MAX_HEAD_DIM];
            for (int64_t i = 0; i < group_; ++i) {
                rope_query(w_, first_head + i, row_, q + i * layout.head_dim);
            }
            w_.kernels->score(layout, q, static_cast<int32_t>(group_), w_.index->blocks(part.stream, part.h0),
                              row_.visible->words.data(), n_block, part.b0, b1, scores_of(w_, row_, first_head),
                              peaks_of(w_, row_, first_head));
        }
        clock_.to(w_.timings->score);
    }

    // What can be begun of a query head now; false when that is nothing.
    bool work_on(int64_t head) {
        Scratch::Head & h = w_.scratch->heads[head];
        if (!h.selected.load(std::memory_order_acquire)) {
            const auto & scored = w_.scratch->kv_heads[head / group_].scored;
            if (scored.load(std::memory_order_acquire) < n_block_ || h.begun.load(std::memory_order_relaxed) ||
                h.begun.exchange(true, std::memory_order_relaxed)) {
                return false;
            }
            select_head(w_, row_, head);
            h.selected.store(true, std::memory_order_release);
            clock_.to(w_.timings->select);
        }
        bool any = false;
        while (h.next.load(std::memory_order_relaxed) < n_split_) {
            const int part = h.next.fetch_add(1, std::memory_order_relaxed);
            if (part < n_split_) {
                attend_part(w_, row_, head, part, n_split_);
                if (h.ended.fetch_add(1, std::memory_order_acq_rel) + 1 == n_split_) {
                    end(head);
                }
                any = true;
            }
        }
        if (any) {
            clock_.to(w_.timings->attend);
        }
        return any;
    }

    void end(int64_t head) {
        const State s = state_of(w_, head, 0);
        for (int split = 1; split < n_split_; ++split) {
            merge(s, state_of(w_, head, split), w_.node->ne[0]);
        }
        finish(w_, s, head, row_);
        n_attended_ += w_.scratch->n_selected[head];
    }

    const NodeWork & w_;
    const Row &      row_;
    bool             refresh_;
    int              ith_, nth_;
    StageClock &     clock_;
    int64_t          n_head_, group_, n_block_; // no blocks when all rows of the stream attend all that they see
    int              n_split_;
    int64_t          n_attended_ = 0;
};

void run_sparse(const NodeWork & w, int ith, int nth) {
    StageClock clock(ith == 0);
    int64_t    stream = -1;
    for (const Row & row : w.plan.rows) {
        RowTasks(w, row, row.stream != stream, ith, nth, clock).run();
        stream = row.stream;
        // Behind it nobody needs scores or cells: the next row may overwrite them.
        w.barrier->wait(nth, [&] { w.scratch->begin_row(nth); });
        clock.to(w.timings->wait);
    }
}

} // namespace

void SpinBarrier::wait(int n_threads, const std::function<void()> & last) {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
        last();
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (Patience patience; round_.load(std::memory_order_acquire) == round;) {
        patience.pause();
    }
}

void Scratch::begin_row(int n_threads) {
    for (int i = 0; i < n_threads; ++i) {
        shares[i].taken.store(0, std::memory_order_relaxed);
    }
    for (KvHead & head : kv_heads) {
        head.scored.store(0, std::memory_order_relaxed);
    }
    for (Head & head : heads) {
        head.begun.store(false, std::memory_order_relaxed);
        head.selected.store(false, std::memory_order_relaxed);
        head.next.store(0, std::memory_order_relaxed);
        head.ended.store(0, std::memory_order_relaxed);
    }
}

void Scratch::reserve(int64_t least_head, int64_t least_block) {
    if (least_head <= n_head && least_block <= n_block) {
        return;
    }
    const int64_t head = std::max(least_head, n_head);
    // n_kv grows by 256 cells at a time; growing by a quarter spares most of the reallocations.
    const int64_t block = least_block <= n_block ? n_block : std::max(least_block, n_block + n_block / 4);
    n_head = n_block = 0;
    scores           = make_aligned<float>(head * block * FASA_BLOCK_CELLS);
    peaks            = make_aligned<float>(head * block * FASA_PEAKS);
    values           = make_aligned<float>(head * block * FASA_BLOCK_CELLS);
    cells            = make_aligned<int32_t>(head * block * FASA_BLOCK_CELLS);
    states           = make_aligned<float>(head * kMaxSplits * (2 + FASA_MAX_HEAD_DIM));
    n_selected.assign(head, 0);
    heads    = std::vector<Head>(head);
    kv_heads = std::vector<KvHead>(head);
    n_head   = head;
    n_block  = block;
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
