// A CUDA device for llama.cpp where there is none: a backend that calls itself CUDA, computes on the CPU in memory that
// it says is not the host's, and has pyfasa's kernels as the emulation runs them. Built as libpyfasa_cuda.so for tests
// of what decides around the kernels: segments, captured graphs, a token's head start.
#include <ggml-backend.h>

#include "../../../seam.h"
#include "machine.h"

namespace {

namespace seam = fasa::seam;

// The parts of ggml-backend-impl.h that seam.h leaves out.
struct BufferTypeInterface {
    const char * (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t size);
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    seam::Slot get_max_size, get_alloc_size;
    bool (*is_host)(ggml_backend_buffer_type_t);
};

struct BufferType {
    BufferTypeInterface iface;
    ggml_backend_dev_t  device;
    void *              context;
};

struct Buffer {
    seam::BufferInterface      iface;
    ggml_backend_buffer_type_t type;
};

struct Device {
    seam::DeviceInterface iface;
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    seam::Slot offload_op;
    ggml_backend_event_t (*event_new)(ggml_backend_dev_t);
    void (*event_free)(ggml_backend_dev_t, ggml_backend_event_t);
    void (*event_synchronize)(ggml_backend_dev_t, ggml_backend_event_t);
    ggml_backend_reg_t registration;
    void *             context;
};

extern Device             device;
extern BufferType         buffer_type;
extern seam::Registration registration;

ggml_backend_dev_t         the_device() { return reinterpret_cast<ggml_backend_dev_t>(&device); }
ggml_backend_buffer_type_t the_buffer_type() { return reinterpret_cast<ggml_backend_buffer_type_t>(&buffer_type); }

const char * name(ggml_backend_dev_t) { return "CUDA0"; }
const char * description(ggml_backend_dev_t) { return "emulation of a CUDA device"; }

// ---- memory --------------------------------------------------------------------------------------------------------

// That of the CPU's own buffers; writes from elsewhere are asked for by the same functions as on a device.
ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t, size_t size) {
    const ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer != nullptr) {
        reinterpret_cast<Buffer *>(buffer)->type = the_buffer_type();
    }
    return buffer;
}

// ---- a backend -----------------------------------------------------------------------------------------------------

ggml_backend_t cpu() {
    static const ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    return backend;
}

ggml_status compute(ggml_backend_t, ggml_cgraph * graph) {
    const int32_t error = emulation::run_now_or_later([graph = *reinterpret_cast<seam::Graph *>(graph)]() mutable {
        return static_cast<int32_t>(ggml_backend_graph_compute(cpu(), reinterpret_cast<ggml_cgraph *>(&graph)));
    });
    return static_cast<ggml_status>(error);
}

void event_record(ggml_backend_t, ggml_backend_event_t) {}
void event_wait(ggml_backend_t, ggml_backend_event_t) {}

ggml_backend_t new_backend(ggml_backend_dev_t, const char *) {
    static uint8_t guid[16]      = {0x66, 0x61, 0x73, 0x61};
    auto *         backend       = new seam::Backend{};
    backend->guid                = &guid;
    backend->iface.get_name      = [](ggml_backend_t) { return "CUDA0"; };
    backend->iface.free          = [](ggml_backend_t own) { delete reinterpret_cast<seam::Backend *>(own); };
    backend->iface.graph_compute = compute;
    backend->iface.event_record  = reinterpret_cast<seam::Slot>(event_record);
    backend->iface.event_wait    = reinterpret_cast<seam::Slot>(event_wait);
    backend->device              = the_device();
    return reinterpret_cast<ggml_backend_t>(backend);
}

// ---- the device ----------------------------------------------------------------------------------------------------

void memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = size_t{8} << 30; }

enum ggml_backend_dev_type type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void properties(ggml_backend_dev_t own, ggml_backend_dev_props * out) {
    *out             = {};
    out->name        = name(own);
    out->description = description(own);
    out->type        = type(own);
    memory(own, &out->memory_free, &out->memory_total);
    out->caps.async = out->caps.events = true;
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor *) { return true; }
bool supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return buft == the_buffer_type(); }

ggml_backend_event_t new_event(ggml_backend_dev_t own) {
    return reinterpret_cast<ggml_backend_event_t>(new seam::Event{own, nullptr});
}

BufferType buffer_type = {{[](ggml_backend_buffer_type_t) { return "CUDA0"; }, allocate,
                           [](ggml_backend_buffer_type_t) { return size_t{64}; }, nullptr, nullptr,
                           [](ggml_backend_buffer_type_t) { return false; }},
                          the_device(),
                          nullptr};

Device device = {{name, description, reinterpret_cast<seam::Slot>(memory), reinterpret_cast<seam::Slot>(type),
                  reinterpret_cast<seam::Slot>(properties), new_backend,
                  reinterpret_cast<seam::Slot>(+[](ggml_backend_dev_t) { return the_buffer_type(); }), nullptr, nullptr,
                  supports_op},
                 supports_buft,
                 nullptr,
                 new_event,
                 [](ggml_backend_dev_t, ggml_backend_event_t event) { delete seam::of(event); },
                 [](ggml_backend_dev_t, ggml_backend_event_t) {},
                 reinterpret_cast<ggml_backend_reg_t>(&registration),
                 nullptr};

seam::Registration registration = {seam::kApiVersion,
                                   [](ggml_backend_reg_t) { return "CUDA"; },
                                   [](ggml_backend_reg_t) { return size_t{1}; },
                                   [](ggml_backend_reg_t, size_t) { return the_device(); },
                                   [](ggml_backend_reg_t, const char *) -> void * { return nullptr; },
                                   nullptr};

} // namespace

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
    cpu(); // before pyfasa asks for the backends that belong to a context
    return reinterpret_cast<ggml_backend_reg_t>(&registration);
}
