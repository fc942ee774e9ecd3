// One replaced attention node: what every worker thread does when llama.cpp's CPU backend reaches it.
#pragma once

#include <ggml.h>

#include <atomic>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "side_index.h"

namespace fasa {

// All threads of the backend run a custom op at once, without a barrier of their own.
class SpinBarrier {
  public:
    void wait(int n_threads);

  private:
    std::atomic<int> arrived_{0};
    std::atomic<int> round_{0};
};

// Work space, grown before the graph runs and shared by its nodes and their rows, one after the other; per query head
// unless said otherwise.
struct Scratch {
    Aligned<float>       scores; // [64 * n_block]
    Aligned<float>       peaks;  // [8 * n_block]
    Aligned<float>       values; // [64 * n_block]
    Aligned<int32_t>     cells;  // [64 * n_block]
    Aligned<float>       states; // [kMaxSplits * (2 + head_dim_v)]: m, d, o
    int64_t              n_head = 0, n_block = 0;
    std::vector<int64_t> n_selected;

    struct alignas(64) Next { // of a thread's parts of selections, which others may take; each in its own cache line
        std::atomic<int> part{0};
    };
    static constexpr int kMaxThreads = 512; // GGML_MAX_N_THREADS
    std::vector<Next>    next        = std::vector<Next>(kMaxThreads);

    static constexpr int kMaxSplits = 64;
    void                 reserve(int64_t n_head, int64_t n_block);
};

struct NodeWork {
    ggml_tensor *          node;
    Plan                   plan;
    float                  scale, softcap; // the node's own op_params are overlaid while it is replaced
    SideIndex *            index;          // nullptr while capturing
    const Kernels *        kernels;
    const fasa_config *    config;
    Scratch *              scratch;
    SpinBarrier *          barrier;
    fasa_timings *         timings; // written by thread 0
    std::atomic<int64_t> * n_attended;
    std::atomic<int64_t> * bytes_attended;
    std::atomic<int64_t> * n_indexed;
    std::atomic<int64_t> * n_verify_failures;
    float *                captured; // f32 [head_dim, n_head, n_rows], or nullptr
    fasa_scorer            scorer;   // in place of score, or nullptr
    void *                 scorer_user;
};

// The ggml_custom_op_t; userdata is a NodeWork.
void run_node(ggml_tensor * dst, int ith, int nth, void * userdata);

} // namespace fasa
