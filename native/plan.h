// Eligibility: the one place that knows which attention nodes may be replaced, and why the others may not.
#pragma once

#include <ggml.h>

#include <memory>
#include <unordered_map>
#include <vector>

#include "profile.h"
#include "write_order.h"

namespace fasa {

// What one mask row lets its query see.
struct Visible {
    std::vector<uint64_t> words; // [ceil(n_kv / 64)]
    int64_t               n_cell  = 0;
    int64_t               n_block = 0; // blocks up to the last visible cell: later ones need no work
    std::vector<int32_t>  forced;      // its first `sinks` and last `recent` tokens, selected whatever they score
};

// All layers of a graph share a mask: each row is read once per graph.
class MaskCache {
  public:
    void clear() { rows_.clear(); }

    // With `forced` filled in; cache_stream is the stream's number in the cache.
    const Visible & row(const ggml_tensor * mask, int64_t stream, int64_t row, const fasa_config & config,
                        const WriteOrder & order, int64_t cache_stream);

  private:
    Visible & read(const ggml_tensor * mask, int64_t stream, int64_t row);

    std::unordered_map<const void *, std::unique_ptr<Visible>> rows_; // by address of the mask row
};

struct Row {
    int64_t         stream; // of the node: ne[3]
    int64_t         row;    // of the stream: ne[1]
    const Visible * visible;
    bool            attend_all; // sees fewer cells than min_ctx: exact attention, in company of a longer row
};

struct Plan {
    int32_t              layer;
    const ggml_tensor *  k; // views of the cache, [head_dim, n_kv, n_head_kv, n_stream]
    const ggml_tensor *  v;
    ggml_tensor *        k_root; // the cache tensor that k views
    int32_t              n_head, n_head_kv;
    int32_t              rotation;     // block of the Hadamard rotation of q and k; 0: none
    int64_t              first_stream; // of the cache, where the node's stream 0 lies
    std::vector<Row>     rows;         // stream by stream; empty while capturing
    std::vector<int64_t> n_block;      // per stream of the node: blocks of the index that its rows score
};

struct PlanContext {
    const Profile *          profile; // nullptr: none
    const Profile::Layouts * layouts;
    const fasa_config *      config;
    MaskCache *              masks;
    const WriteOrder *       order;          // of the cache that the node views; nullptr: not followed
    bool                     device = false; // of a CUDA device: masks are read by the kernels, rows are not listed
};

// Nodes that compute nothing: views of another tensor, and inputs.
bool is_view_op(const ggml_tensor * t);

// Whether a graph's node is there to be computed, and does something.
bool is_computed(const ggml_tensor * node);

// llama.cpp casts a K or V of f32 to f16 before each attention node: the view that is cast, or t itself.
const ggml_tensor * before_cast(const ggml_tensor * t);

// See fasa_pays_from_cuda().
int32_t pays_from_cuda(int32_t k_type, int32_t group);

// Pure. Returns FASA_REASON_SPARSE or FASA_REASON_CAPTURE with `out` filled, or the reason to leave the node alone.
// sliding: the layer is known or suspected to see a window only (sliding_window.h).
fasa_reason plan(const ggml_tensor * node, const PlanContext & context, bool sliding, Plan * out);

// The cache tensor "cache_k_l<layer>" behind a view, or nullptr; sets *layer.
ggml_tensor * cache_root(const ggml_tensor * view, int32_t * layer);

// Whether the mask of a node is an input: set before the graph runs, the same for all heads.
bool mask_is_input(const ggml_tensor * node);

// Whether the host can read what a tensor holds.
bool on_host(const ggml_tensor * t);

// Whether the model was trained sparse: the mask shows what it has selected.
bool selects_by_itself(const ggml_tensor * node);

} // namespace fasa
