// Eligibility: the one place that knows which attention nodes may be replaced, and why the others may not.
#pragma once

#include <ggml.h>

#include <memory>
#include <unordered_map>
#include <vector>

#include "profile.h"

namespace fasa {

// Visible cells of one mask row.
struct Visible {
    std::vector<uint64_t> words; // [ceil(n_kv / 64)]
    int64_t               n_cell  = 0;
    int64_t               n_block = 0; // blocks up to the last visible cell: later ones need no work
};

// All layers of a graph share a mask: each is read once per graph.
class MaskCache {
  public:
    const Visible & row(const ggml_tensor * mask, int64_t row);
    void            clear() { rows_.clear(); }

  private:
    std::unordered_map<const void *, std::unique_ptr<Visible>> rows_; // by address of the mask row
};

struct Plan {
    int32_t         layer;
    ggml_tensor *   k_root; // the cache tensor that src[1] views
    int32_t         n_head, n_head_kv;
    int32_t         rotation; // block of the Hadamard rotation of q and k; 0: none
    const Visible * visible;  // of row 0; nullptr while capturing
};

// Pure. Returns FASA_REASON_SPARSE or FASA_REASON_CAPTURE with `out` filled, or the reason to leave the node alone.
fasa_reason plan(const ggml_tensor * node, const Profile * profile, const Profile::Layouts * layouts,
                 const fasa_config & config, MaskCache & masks, Plan * out);

// The cache tensor "cache_k_l<layer>" behind a view, or nullptr; sets *layer.
ggml_tensor * cache_root(const ggml_tensor * view, int32_t * layer);

} // namespace fasa
