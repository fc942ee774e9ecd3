// A selection that starts from the cells that score has marked, a bit each: listed in shared memory, and counted in
// bins of a range that the last tokens foretell. The thread blocks of a cluster have a part of the context each.
#pragma once

#include "kth.cuh"
#include "warp.cuh"

namespace fasa::gpu {

// A thread's marks that are on their way together, a word of 32 cells each: all in a context of up to 131,072 cells. A
// warp has words that follow each other, and its lanes take turns: marks lie close together.
template <int BLOCKS> struct Marks {
    static constexpr int kHere = 4 / BLOCKS;
    const uint32_t *     words;
    int                  first, end; // of the lane; those of the warp end at `end`
    uint32_t             held[kHere];

    __device__ Marks(const uint32_t * marks, int n_word, int rank) : words(marks) {
        constexpr int kSharers = BLOCKS * kWarps;
        const int share = (n_word + kSharers - 1) / kSharers, warp = rank * kWarps + static_cast<int>(threadIdx.x) / 32;
        first = warp * share + static_cast<int>(threadIdx.x) % 32;
        end   = min(warp * share + share, n_word);
#pragma unroll
        for (int j = 0; j < kHere; ++j) {
            held[j] = words[min(first + 32 * j, n_word - 1)];
        }
    }

    // f(word, its number) for each turn of the lanes; a lane that has none gets 0.
    template <typename F> __device__ void each(F && f) const {
#pragma unroll
        for (int j = 0; j < kHere; ++j) {
            f(first + 32 * j < end ? held[j] : 0, first + 32 * j);
        }
        for (int i = first + 32 * kHere; __any_sync(~0u, i < end); i += 32) {
            f(i < end ? words[i] : 0, i);
        }
    }
};

// The block's marked cells in order into sh.marked; their number, which is above kMarked when they do not fit.
template <int BLOCKS> __device__ int list_marked(Selection & sh, Block & block, const Marks<BLOCKS> & marks) {
    const int lane = threadIdx.x % 32;
    int       own  = 0;
    marks.each([&](uint32_t word, int) { own += __popc(word); });
    int total;
    int at = block.sum_of_warps_before(lane == 0, warp_total(own), &total);
    if (total <= kMarked) {
        marks.each([&](uint32_t word, int number) {
            if (__ballot_sync(~0u, word != 0) == 0) {
                return;
            }
            const int after = at + warp_inclusive_sum(__popc(word), lane);
            at              = __shfl_sync(~0u, after, 31);
            for (int i = after - __popc(word); word != 0; word &= word - 1, ++i) {
                sh.marked[i] = 32 * number + __ffs(static_cast<int>(word)) - 1;
            }
        });
    }
    if (threadIdx.x == 0) {
        sh.n_marked = total;
        if (total == 0 || total > kMarked) {
            sh.marked[0] = 0; // whose score is loaded, to no end
        }
    }
    __syncthreads();
    return total;
}

// Lanes of a warp that take 32 N things in turns, which follow each other: a thread's first one.
template <int N> __device__ int first_in_turns() {
    return static_cast<int>(threadIdx.x) / 32 * 32 * N + static_cast<int>(threadIdx.x) % 32;
}

// How many values of the warps before this one, and of all, are above t, in the upper half of a word, and equal it.
template <int N> __device__ int count_around(Block & block, const Registers<N> & values, float t, int * total) {
    int own = 0;
    values.each([&](float x, int) { own += (x > t ? 1 << 16 : 0) | (x == t ? 1 : 0); });
    return block.sum_of_warps_before(threadIdx.x % 32 == 0, warp_total(own), total);
}

// Writes up to `limit` of the cells that a warp's lanes took in turns, as write_cells does. all, in_blocks_before: how
// many of them are above t and equal it. Counts of the context fit in half a word.
template <int N, typename Cell>
__device__ void write_in_turns(Block & block, const Registers<N> & values, float t, const Counts & all,
                               const Counts & in_blocks_before, int limit, int32_t * out, Cell && cell) {
    const uint32_t before_lane = (1u << threadIdx.x % 32) - 1;
    int            total;
    const int      before  = count_around(block, values, t, &total);
    const int      n_equal = limit - all.above;
    int            at = in_blocks_before.above + (before >> 16), equals = in_blocks_before.equal + (before & 0xffff);
    if (n_equal == all.equal) { // as nearly always: all that equal the threshold are selected
        at += equals;
        values.each([&](float x, int i) {
            const uint32_t reach = __ballot_sync(~0u, x >= t);
            if (x >= t) {
                out[at + __popc(reach & before_lane)] = cell(i);
            }
            at += __popc(reach);
        });
        return;
    }
    values.each([&](float x, int i) {
        const uint32_t above = __ballot_sync(~0u, x > t), equal = __ballot_sync(~0u, x == t);
        const int      of_equals = equals + __popc(equal & before_lane);
        if (x > t || (x == t && of_equals < n_equal)) {
            out[at + __popc(above & before_lane) + min(of_equals, n_equal)] = cell(i);
        }
        at += __popc(above), equals += __popc(equal);
    });
}

struct Best {
    bool  found;
    int   n_marked; // of all blocks
    float least;    // selected, if found
};

// What is counted in bins behind a filter: their threshold should be a quarter of the way up, so that no reduction has
// to find a range. Rounding of the two means may put the level an ulp below the mark; a range that falls would have
// bins before the first.
__device__ inline Range foretold(const Filter & passed) {
    return {passed.mark, passed.mark + 4.0f * fmaxf(passed.level - passed.mark, 0.0f)};
}

// Whether the bin of the threshold says what it is: the last one has all that lies above.
__device__ inline bool tells(const Selection & sh) { return sh.bin < kBins - 1 && sh.count <= kList; }

// The best of all marked cells, of which this block has listed n. A warp has 32 N that follow each other, which its
// lanes take in turns: neighbours are near in memory.
template <int N, int BLOCKS>
__device__ Best best_of_listed(Selection & sh, Block & block, const Cluster<BLOCKS> & cluster, const float * scores,
                               int n, const Filter & passed, int budget, int32_t * out) {
    const Range   r = foretold(passed);
    const Binning bin(r);
    const int     first = first_in_turns<N>();
    Registers<N>  own;
#pragma unroll
    for (int i = 0; i < N; ++i) { // all on their way together
        own.x[i] = scores[sh.marked[max(min(first + 32 * i, n - 1), 0)]];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        own.x[i] = first + 32 * i < n ? own.x[i] : -CUDART_INF_F;
        if (first + 32 * i < n) {
            atomicAdd(sh.bins + bin(own.x[i]), 1);
        }
    }
    cluster.sync();
    Best best = {r.hi > r.lo, 0, 0.0f};
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
        const int of_block = *cluster.of(&sh.n_marked, i);
        best.n_marked += of_block;
        best.found = best.found && of_block <= kMarked;
    }
    if (best.found && best.n_marked >= budget) {
        find_bin(sh, block, cluster, budget);
        best.found = tells(sh);
    } else {
        best.found = false;
    }
    if (!best.found) { // the same for all blocks; none may go as long as another one reads its counts
        cluster.sync();
        return best;
    }
    rank_bin(sh, cluster, own, bin, r, budget - sh.all.above);
    best.least = sh.result;
    write_in_turns(block, own, sh.result, sh.all, sh.before, budget, out,
                   [&](int i) { return sh.marked[first + 32 * i]; });
    return best;
}

// All of that; behind clear_bins. Not found: there are too few marked cells, or too many.
template <int BLOCKS>
__device__ Best best_of_marked(Selection & sh, Block & block, const Cluster<BLOCKS> & cluster,
                               const Marks<BLOCKS> & marks, const float * scores, const Filter & passed, int budget,
                               int32_t * out) {
    const int n_marked = list_marked(sh, block, marks), n = n_marked <= kMarked ? n_marked : 0;
    return n <= 4 * kThreads   ? best_of_listed<4>(sh, block, cluster, scores, n, passed, budget, out)
           : n <= 6 * kThreads ? best_of_listed<6>(sh, block, cluster, scores, n, passed, budget, out)
                               : best_of_listed<kMarked / kThreads>(sh, block, cluster, scores, n, passed, budget, out);
}

} // namespace fasa::gpu
