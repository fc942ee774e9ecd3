// One llama_context: its profile and configuration, the side indexes of its layers, and what happens around each
// graph. The decorator (backend.cpp) calls compute() in place of the inner backend's graph_compute.
#pragma once

#include <ggml-backend.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "attention.h"
#include "gpu/decoder.h"
#include "plan.h"
#include "seam.h"
#include "side_index.h"
#include "sliding_window.h"

namespace fasa {

using GraphCompute = ggml_status (*)(ggml_backend_t, ggml_cgraph *);

class Session {
  public:
    Session(const fasa_profile * profile, const fasa_config & config);

    ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph, GraphCompute inner);

    // K memory changed, or its buffer is about to be freed; called by the decorated buffer.
    void bytes_written(const void * first, size_t size);
    void buffer_freed(ggml_backend_buffer_t buffer);
    void backend_freed(ggml_backend_t backend);
    // Something is about to be set in a watched buffer: true when it is there already, and need not be.
    bool has_input(const ggml_tensor * t, const void * data, size_t offset, size_t size);
    void buffer_reset(); // a scheduler places the tensors of another graph

    // Whether an attention node with its cache in host memory should be computed here rather than by a GPU.
    bool wants(const ggml_tensor * node) const;

    // From now on caches of other models than the profile's stay dense; `tell` gets a sentence about each difference.
    void check_model(const fasa_model & model, std::function<void(const std::string &)> tell);

    void          configure(const fasa_config & config);
    void          set_profile(const fasa_profile * profile);
    fasa_counters counters() const;
    fasa_timings  timings() const;
    void          reset();
    void          invalidate();
    void          set_scorer(fasa_scorer scorer, void * user);
    void          captured(int32_t layer, int32_t * head_dim, int32_t * n_head, int64_t * n_rows, float * out) const;
    void          captured_clear();
    void keys(int32_t layer, int64_t c0, int64_t c1, int32_t * head_dim, int32_t * n_head_kv, float * out) const;

  private:
    struct Layer {
        std::unique_ptr<SideIndex> index;
        int64_t                    kv_bytes; // of the cache tensors
        fasa_kv                    kv;       // of the last node, for keys(): k, k_stride, k_type, k_dim in use
        int64_t                    head_bytes, n_kv;
        int32_t                    n_head_kv, rotation;
        ggml_backend_buffer_t      buffer;
    };
    struct Captured {
        int32_t            head_dim = 0, n_head = 0;
        std::vector<float> rows;
    };
    struct Write { // a node that changes K after the layer's attention node has refreshed the index
        SideIndex *         index;
        const ggml_tensor * node;
    };

    void         note_embedding(ggml_cgraph * graph);
    ggml_status  compute_on_gpu(ggml_backend_t backend, ggml_cgraph * graph, GraphCompute inner);
    bool         several_masks() const; // seen by any device
    void         scan(ggml_cgraph * graph);
    void         compare_model(ggml_cgraph * graph);
    fasa_reason  prepare(ggml_tensor * node);
    fasa_reason  prepare_index(const Plan & plan, Layer & layer);
    void         note_write(const ggml_tensor * node);
    WriteOrder * order_of(const ggml_tensor * k_root);
    static void  mark(SideIndex & index, const ggml_tensor * node);
    void         reserve_scratch();
    void         complete_work();
    void         find_idle_casts(ggml_cgraph * graph);
    void         replace();
    void         save(ggml_tensor * node);
    void         refuse_while_running(const char * what) const;
    void         restore();

    // Recursive: an abort callback runs inside compute() and may read the counters.
    mutable std::recursive_mutex            mutex_;
    bool                                    running_ = false;
    std::unique_ptr<Profile>                profile_;
    std::shared_ptr<const Profile::Layouts> layouts_;
    fasa_config                             config_      = {};
    const Kernels *                         kernels_     = nullptr;
    fasa_scorer                             scorer_      = nullptr;
    void *                                  scorer_user_ = nullptr;
    int64_t                                 generation_  = 0; // changes with profile, layouts and configuration
    std::map<ggml_backend_t, std::unique_ptr<gpu::Decoder>> gpus_;
    gpu::Embedding                                          embedding_; // of the CPU's last graph
    std::map<int32_t, Layer>                                layers_;    // by layer number
    fasa_model                                              model_ = {};
    std::function<void(const std::string &)>                tell_;    // empty: the model is not checked
    std::set<ggml_backend_buffer_t>                         foreign_; // caches of other models
    std::map<int32_t, Captured>                             captured_;
    SlidingWindows                                          windows_;
    std::map<ggml_backend_buffer_t, WriteOrder>             orders_; // by the buffer that holds a cache's layers
    fasa_counters                                           counters_ = {};
    fasa_timings                                            timings_  = {};
    std::atomic<int64_t> n_attended_{0}, bytes_attended_{0}, n_indexed_{0}, n_verify_failures_{0};

    // of the graph that is running
    MaskCache                  masks_;
    std::vector<NodeWork>      work_;
    std::vector<Write>         late_;
    std::vector<ggml_tensor *> idle_casts_;
    struct Saved {
        ggml_tensor * node;
        ggml_op       op;
        int32_t       op_params[GGML_MAX_OP_PARAMS / sizeof(int32_t)];
    };
    std::vector<Saved> saved_;
    Scratch            scratch_;
    SpinBarrier        barrier_;
};

// Throws a Failure with a sentence naming the value and its limit.
void check_config(const fasa_config & config);

} // namespace fasa
