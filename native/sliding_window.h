// Which layers attend to a sliding window only. Nothing in a graph says so: such layers have a mask of their own, which
// shows a long row fewer cells than the mask of the full layers does.
#pragma once

#include <ggml.h>

#include <cstddef>
#include <functional>
#include <unordered_map>

namespace fasa {

class SlidingWindows {
  public:
    // Copies bytes of a mask to the host before its graph runs; false when it cannot.
    using Read = std::function<bool(const ggml_tensor * mask, size_t offset, size_t bytes, void * out)>;

    static bool read_host(const ggml_tensor * mask, size_t offset, size_t bytes, void * out);

    // Compares the masks of a graph's attention nodes; what has been learned about a layer stays. True: it changed.
    // Where reading is dear: graphs of no more than max_rows rows are read only when n_kv is not that of the last time.
    bool learn(ggml_cgraph * graph, const Read & read = read_host, int64_t max_rows = 0);

    // Also true while a model with several masks has not shown which of them is the window.
    bool contains(int32_t layer) const;

    // Another device has layers of the same model: what it has seen of several masks holds here. True: it was news.
    bool several_masks() const { return several_masks_; }
    bool suspect();

  private:
    std::unordered_map<int32_t, bool> layers_; // true: a window
    bool                              several_masks_ = false;
    int64_t                           n_kv_read_     = 0; // the longest mask of the graph that was read last
};

} // namespace fasa
