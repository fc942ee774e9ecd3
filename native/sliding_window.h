// Which layers attend to a sliding window only. Nothing in a graph says so: such layers have a mask of their own, which
// shows a long row fewer cells than the mask of the full layers does.
#pragma once

#include <ggml.h>

#include <unordered_map>

namespace fasa {

class SlidingWindows {
  public:
    // Compares the masks of a graph's attention nodes; what has been learned about a layer stays.
    void learn(ggml_cgraph * graph);

    // Also true while a model with several masks has not shown which of them is the window.
    bool contains(int32_t layer) const;

  private:
    std::unordered_map<int32_t, bool> layers_; // true: a window
    bool                              several_masks_ = false;
};

} // namespace fasa
