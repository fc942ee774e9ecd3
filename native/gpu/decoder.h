// One decorated CUDA backend: attention nodes of decode graphs go to our kernels on our stream, all else to the inner
// backend. No step waits for the device, but for masks as long as nobody knows which layers have windows.
//
// A graph runs in one of three ways: untouched; in segments, cut at the attention nodes, with events between the two
// streams; or as one captured CUDA graph of all of that. A graph seen for the second time is captured, and launched
// from then on until llama.cpp builds another. In it cells are chosen as soon as a layer's query is there, beside
// llama.cpp's kernels for its key and value. It is launched before its inputs are complete where they can be foretold
// (head_start.h).
#pragma once

#include <ggml-backend.h>

#include <map>
#include <memory>
#include <vector>

#include "../profile.h"
#include "../seam.h"
#include "../sliding_window.h"
#include "head_start.h"
#include "index.h"

namespace fasa {
class Session;
}

namespace fasa::gpu {

using GraphCompute = ggml_status (*)(ggml_backend_t, ggml_cgraph *);

// What the session has in force.
struct Settings {
    Session *                               session;
    const Profile *                         profile;
    std::shared_ptr<const Profile::Layouts> layouts;
    fasa_config                             config;
    int64_t                                 generation; // changes with any of them
    fasa_counters *                         counters;
    bool several_masks; // another device of the session has seen several: the model has sliding windows
};

class Decoder {
  public:
    Decoder(const Api * api, ggml_backend_t backend);
    ~Decoder();
    Decoder(const Decoder &)             = delete;
    Decoder & operator=(const Decoder &) = delete;

    ggml_status compute(ggml_cgraph * graph, GraphCompute inner, const Settings & settings);

    // llama.cpp has set the token of the graph that comes next.
    void token_is_set(const Embedding & embedding, const fasa_config & config, const Profile::Layouts * layouts);
    // It is about to set this: true when it is there already.
    bool has_input(const ggml_tensor * t, const void * data, size_t offset, size_t size);
    void graph_replaced(); // llama.cpp's scheduler places another one
    void undo();           // what has begun early, if anything has

    bool bytes_written(const void * first, size_t size); // true when K of an index was touched
    void buffer_freed(ggml_backend_buffer_t buffer);
    void invalidate();

    void add_to(fasa_counters * counters) const; // waits for the device
    void reset();

    bool several_masks() const { return sliding_.several_masks(); }

  private:
    struct Work {               // an attention node that is replaced
        int           at;       // in the graph
        int           ready_at; // from this node of the graph on its query and mask are there
        ggml_tensor * node;
        Plan          plan;
        DeviceIndex * index;
        int32_t       cells;         // which of cells_ the graph's SET_ROWS of this layer names; -1: unknown
        Piece         ahead[kAhead]; // weights that the graph multiplies by behind it
        Node          args;
    };
    struct Cells { // an index tensor of SET_ROWS nodes
        const ggml_tensor * tensor;
        int64_t             at; // where its copy is in new_cells_
    };
    struct Graph {                                          // what scan() found in one
        uint64_t                                uid    = 0; // ggml's: the same while the graph is reused
        fasa_config                             config = {};
        std::shared_ptr<const Profile::Layouts> layouts;
        int64_t                                 epoch = 0;
        std::vector<Work>                       work;
        std::vector<int32_t>                    written; // layers whose K it writes without a replaced node
        std::vector<Cells>                      cells;
        bool          waits  = false; // upstream reads something of it on the host: not to be captured
        fasa_counters counts = {};    // of one run
    };

    void        learn(ggml_cgraph * graph, const Settings & settings);
    bool        read(const ggml_tensor * mask, size_t offset, size_t bytes, void * out); // waits for the device
    void        scan(ggml_cgraph * graph, const Settings & settings, Graph * out);
    fasa_reason prepare(ggml_cgraph * graph, int at, const Settings & settings, Graph * out);
    fasa_reason prepare_index(const Plan & plan, const Settings & settings, const Graph & graph);
    void        note_write(const ggml_tensor * node, Graph * out);
    void        open(const void * memory);
    void        reserve(const fasa_config & config, Graph * out);
    Node        arguments(const Work & work, const Graph & graph, const fasa_config & config) const;
    bool        same_as_last(const Graph & graph) const;
    bool        is_built(const Graph & graph) const;
    void        count(const Graph & graph, fasa_counters * counters) const;
    void        mark_stale(int32_t layer);
    void        mark_written(const Graph & graph);
    bool        copy_new_cells(const Graph & graph);
    ggml_status segments(ggml_cgraph * graph, GraphCompute inner, const Graph & scanned, bool capturing, bool verify);
    bool        build(const Work & work);
    bool        choose(const Work & work);
    bool        capture(ggml_cgraph * graph, GraphCompute inner, const Graph & scanned);
    bool        launch();
    void        arm(ggml_cgraph * graph, Session * session);
    bool        fork(); // the inner stream's work so far comes before ours
    bool        join(); // and ours before the inner stream's
    void        forget();

    const Api *             api_;
    ggml_backend_t          backend_;
    std::shared_ptr<Stream> stream_; // once the first cache has shown on which device
    ggml_backend_event_t    fork_ = nullptr, join_ = nullptr;
    Graph                   last_; // the last one with replaced nodes
    Capture *               capture_     = nullptr;
    bool                    is_captured_ = false; // capture_ is last_; else an older one, to be updated
    uint8_t                 n_captures_  = 0;     // of those ever made, the last eight bits
    HeadStart               head_start_;
    int64_t                 n_begun_ = 0, n_undone_ = 0;

    std::map<int32_t, std::unique_ptr<DeviceIndex>>     indexes_; // by layer
    std::map<int32_t, int64_t>                          kv_bytes_;
    std::map<int32_t, std::pair<const void *, int64_t>> too_large_;      // K and generation whose index found no memory
    std::map<int32_t, int32_t>                          cells_of_layer_; // of the graph being scanned; -1: unknown
    SlidingWindows                                      sliding_;
    int64_t epoch_     = 0; // changes when memory that a capture holds has moved, or other nodes are to be replaced
    int64_t row_bytes_ = 0; // of K and V

    Memory<int64_t>  new_cells_, totals_;
    Memory<uint32_t> marks_;
    Memory<int8_t>   codes_;
    Memory<float>    levels_, norms_, scores_, peaks_, parts_;
    Memory<Filter>   thresholds_;
    Memory<Window>   windows_;
    Memory<int32_t>  n_visible_, selected_, n_selected_, arrived_;
};

} // namespace fasa::gpu
