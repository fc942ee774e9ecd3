// The cells that score has marked, a bit each, as a list in shared memory.
#pragma once

#include "kth.cuh"
#include "warp.cuh"

namespace fasa::gpu {

// A thread's marks that are on their way together, a word of 32 cells each: all in a context of up to 131,072 cells. A
// warp has words that follow each other, and its lanes take turns: marks lie close together.
struct Marks {
    static constexpr int kHere = 4;
    const uint32_t *     words;
    int                  first, end; // of the lane; those of the warp end at `end`
    uint32_t             held[kHere];

    __device__ Marks(const uint32_t * marks, int n_word) : words(marks) {
        const int share = (n_word + kWarps - 1) / kWarps, warp = static_cast<int>(threadIdx.x) / 32;
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

// Marked cells in order into sh.marked; their number, which is above kMarked when they do not fit.
__device__ inline int list_marked(Selection & sh, Block & block, const Marks & marks) {
    const int lane = threadIdx.x % 32;
    int       own  = 0;
    marks.each([&](uint32_t word, int) { own += __popc(word); });
    int total;
    int at = __shfl_sync(~0u, block.exclusive_sum(own, &total), 0); // of the warp
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
    __syncthreads();
    return total;
}

} // namespace fasa::gpu
