// One replaced attention node: what every worker thread does when llama.cpp's CPU backend reaches it.
#pragma once

#include <ggml.h>

#include <atomic>
#include <functional>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "side_index.h"

namespace fasa {

// All threads of the backend run a custom op at once, without a barrier of their own.
class SpinBarrier {
  public:
    // Who comes last calls `last` while the others still wait.
    void wait(int n_threads, const std::function<void()> & last);

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

    // What is done of a row, each in its own cache line; all zero before it begins.
    struct alignas(64) Share {         // of a thread
        std::atomic<int64_t> taken{0}; // chunks
    };
    struct alignas(64) KvHead {
        std::atomic<int64_t> scored{0}; // blocks
    };
    struct alignas(64) Head {
        std::atomic<bool> begun{false}, selected{false};
        std::atomic<int>  next{0}, ended{0}; // parts of its selection
    };
    static constexpr int kMaxThreads = 512; // GGML_MAX_N_THREADS
    std::vector<Share>   shares      = std::vector<Share>(kMaxThreads);
    std::vector<KvHead>  kv_heads;
    std::vector<Head>    heads;

    static constexpr int kMaxSplits = 64;
    void                 reserve(int64_t n_head, int64_t n_block);
    void                 begin_row(int n_threads);
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
