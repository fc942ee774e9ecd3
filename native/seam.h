// Mirrors of the structs of ggml-backend-impl.h (ggml 0.25), which llama-cpp-python does not install. Only the slots
// that pyfasa reads or replaces have their real types. self_test.cpp proves the layout before anything is replaced.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

namespace fasa::seam {

using Slot = void (*)();

struct DeviceInterface {
    const char * (*get_name)(ggml_backend_dev_t);
    const char * (*get_description)(ggml_backend_dev_t);
    Slot get_memory;
    Slot get_type;
    Slot get_props;
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char * params);
    Slot get_buffer_type;
    Slot get_host_buffer_type;
    Slot buffer_from_host_ptr;
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    // more slots follow
};

struct Device {
    DeviceInterface iface;
};

struct BackendInterface {
    const char * (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    Slot set_tensor_async;
    Slot get_tensor_async;
    Slot set_tensor_2d_async;
    Slot get_tensor_2d_async;
    Slot cpy_tensor_async;
    Slot synchronize;
    Slot graph_plan_create;
    Slot graph_plan_free;
    Slot graph_plan_update;
    Slot graph_plan_compute;
    ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph *);
    Slot event_record;
    Slot event_wait;
    Slot graph_optimize;
};

struct Backend {
    ggml_guid_t        guid;
    BackendInterface   iface;
    ggml_backend_dev_t device;
    void *             context;
};

struct BufferInterface {
    void (*free_buffer)(ggml_backend_buffer_t);
    void * (*get_base)(ggml_backend_buffer_t);
    Slot init_tensor;
    void (*memset_tensor)(ggml_backend_buffer_t, ggml_tensor *, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(ggml_backend_buffer_t, ggml_tensor *, const void * data, size_t offset, size_t size);
    Slot get_tensor;
    void (*set_tensor_2d)(ggml_backend_buffer_t, ggml_tensor *, const void * data, size_t offset, size_t size,
                          size_t n_copies, size_t stride_tensor, size_t stride_data);
    Slot get_tensor_2d;
    bool (*cpy_tensor)(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst);
    void (*clear)(ggml_backend_buffer_t, uint8_t value);
    void (*reset)(ggml_backend_buffer_t);
};

struct Buffer {
    BufferInterface iface;
};

struct Registration { // ggml_backend_reg, which a loaded backend returns
    int api_version;
    const char * (*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t index);
    void * (*get_proc_address)(ggml_backend_reg_t, const char * name);
    void * context;
};
constexpr int kApiVersion = 2;

struct Event {
    ggml_backend_dev_t device;
    void *             context; // of CUDA: a cudaEvent_t
};

struct Graph { // ggml_cgraph
    int            size, n_nodes, n_leafs;
    ggml_tensor ** nodes;
    ggml_tensor ** grads;
    ggml_tensor ** grad_accs;
    ggml_tensor ** leafs;
    int32_t *      use_counts;
    struct {
        size_t         size;
        uint32_t *     used;
        ggml_tensor ** keys;
    } visited;
    int      order;
    uint64_t uid;
};

inline Event * of(ggml_backend_event_t event) { return reinterpret_cast<Event *>(event); }

// Whether the mirror shows what ggml's own functions say of a graph.
inline bool is_mirrored(ggml_cgraph * graph) {
    const auto * g = reinterpret_cast<const Graph *>(graph);
    return g->n_nodes == ggml_graph_n_nodes(graph) && g->nodes == ggml_graph_nodes(graph);
}

// A number that stays while llama.cpp reuses a graph; 0: unknown.
inline uint64_t uid_of(ggml_cgraph * graph) {
    return is_mirrored(graph) ? reinterpret_cast<const Graph *>(graph)->uid : 0;
}

// Nodes i0 <= i < i1 as a graph, like ggml_graph_view.
inline Graph part_of(ggml_cgraph * graph, int i0, int i1) {
    Graph part     = *reinterpret_cast<const Graph *>(graph);
    part.size      = 0;
    part.n_nodes   = i1 - i0;
    part.n_leafs   = 0;
    part.nodes     = part.nodes + i0;
    part.grads     = nullptr;
    part.grad_accs = nullptr;
    part.leafs     = nullptr;
    part.uid       = 0;
    return part;
}

inline Device *  of(ggml_backend_dev_t device) { return reinterpret_cast<Device *>(device); }
inline Backend * of(ggml_backend_t backend) { return reinterpret_cast<Backend *>(backend); }
inline Buffer *  of(ggml_backend_buffer_t buffer) { return reinterpret_cast<Buffer *>(buffer); }

// What ggml_compute_forward_custom reads from op_params of a GGML_OP_CUSTOM node.
struct CustomOp {
    ggml_custom_op_t fun;
    int              n_tasks;
    void *           userdata;
};

} // namespace fasa::seam
