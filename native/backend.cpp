// Section order: registry of what is decorated; hooks of a buffer, a backend, a device; attach and detach.
// Hooks look up their object and call on without holding the registry's lock: sessions have locks of their own.
#include "backend.h"

#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "gpu/library.h"
#include "plan.h"
#include "seam.h"
#include "session.h"
#include "status.h"

namespace fasa {

namespace {

struct DecoratedBackend {
    seam::BackendInterface inner;
    Session *              session;
};

struct DecoratedBuffer {
    seam::BufferInterface inner;
    Session *             session;
};

using InitBackend = decltype(seam::DeviceInterface::init_backend);
using SupportsOp  = decltype(seam::DeviceInterface::supports_op);

// ggml reads the slot whenever it likes, so it changes in one piece.
InitBackend init_slot(const seam::DeviceInterface & iface) {
    return __atomic_load_n(&iface.init_backend, __ATOMIC_ACQUIRE);
}
void set_init_slot(seam::DeviceInterface & iface, InitBackend init) {
    __atomic_store_n(&iface.init_backend, init, __ATOMIC_RELEASE);
}

struct Registry {
    std::mutex                                                 mutex;
    std::unordered_map<ggml_backend_t, DecoratedBackend>       backends;
    std::unordered_map<ggml_backend_buffer_t, DecoratedBuffer> buffers;
    std::unordered_map<const Session *, int>                   sessions;
    std::unordered_map<ggml_backend_dev_t, InitBackend>        inner_inits; // of devices that are or were decorated
    std::unordered_map<ggml_backend_dev_t, SupportsOp>         inner_supports;
    std::unordered_map<ggml_backend_buffer_t, Session *>       host_caches; // of contexts whose weights are on a GPU
    const SessionSource *                                      source = nullptr;
};

Registry & registry() {
    static Registry & r = *new Registry; // hooks may run until the very end of the process
    return r;
}

thread_local Session * armed = nullptr;

template <typename Key, typename Value> Value find(const std::unordered_map<Key, Value> & map, Key key) {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    return map.at(key); // a hook runs only on objects that are in the registry
}

template <typename Key, typename Value> Value take(std::unordered_map<Key, Value> & map, Key key) {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    const Value                       value = map.at(key);
    map.erase(key);
    return value;
}

const SessionSource * session_source() {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    return registry().source;
}

// ---- buffer: every way to write into it besides a graph ----------------------------------------------------

void buffer_free(ggml_backend_buffer_t buffer) {
    const DecoratedBuffer d = take(registry().buffers, buffer);
    d.session->buffer_freed(buffer);
    seam::of(buffer)->iface = d.inner;
    d.inner.free_buffer(buffer);
}

void buffer_memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    const DecoratedBuffer d = find(registry().buffers, buffer);
    d.inner.memset_tensor(buffer, t, value, offset, size);
    d.session->bytes_written(static_cast<const char *>(t->data) + offset, size);
}

void buffer_set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    const DecoratedBuffer d = find(registry().buffers, buffer);
    if (!d.session->has_input(t, data, offset, size)) {
        d.inner.set_tensor(buffer, t, data, offset, size);
    }
    d.session->bytes_written(static_cast<const char *>(t->data) + offset, size);
}

void buffer_set_tensor_2d(ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset, size_t size,
                          size_t n_copies, size_t stride_tensor, size_t stride_data) {
    const DecoratedBuffer d = find(registry().buffers, buffer);
    d.inner.set_tensor_2d(buffer, t, data, offset, size, n_copies, stride_tensor, stride_data);
    d.session->bytes_written(static_cast<const char *>(t->data) + offset, (n_copies - 1) * stride_tensor + size);
}

bool buffer_cpy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
    const DecoratedBuffer d      = find(registry().buffers, buffer);
    const bool            copied = d.inner.cpy_tensor(buffer, src, dst);
    d.session->bytes_written(dst->data, ggml_nbytes(dst));
    return copied;
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    const DecoratedBuffer d = find(registry().buffers, buffer);
    d.inner.clear(buffer, value);
    d.session->bytes_written(d.inner.get_base(buffer), ggml_backend_buffer_get_size(buffer));
}

// A scheduler is about to place the tensors of another graph in it.
void buffer_reset(ggml_backend_buffer_t buffer) {
    const DecoratedBuffer d = find(registry().buffers, buffer);
    d.session->buffer_reset();
    if (d.inner.reset != nullptr) {
        d.inner.reset(buffer);
    }
}

// ---- backend ---------------------------------------------------------------------------------------------------

ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    const DecoratedBackend d = find(registry().backends, backend);
    return d.session->compute(backend, graph, d.inner.graph_compute);
}

void backend_free(ggml_backend_t backend) {
    const DecoratedBackend d = take(registry().backends, backend);
    d.session->backend_freed(backend);
    d.inner.free(backend);
    if (const SessionSource * source = session_source()) {
        source->backend_freed(d.session);
    }
}

void decorate(ggml_backend_t backend, Session * session) {
    seam::Backend *                   b = seam::of(backend);
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().backends[backend] = {b->iface, session};
    b->iface.graph_compute       = backend_graph_compute;
    b->iface.free                = backend_free;
}

// ---- device ----------------------------------------------------------------------------------------------------

ggml_backend_t device_init_backend(ggml_backend_dev_t device, const char * params) {
    const InitBackend     inner   = find(registry().inner_inits, device);
    const ggml_backend_t  backend = inner(device, params);
    const SessionSource * source  = session_source();
    Session *             session = armed;
    if (backend != nullptr && session == nullptr && source != nullptr) {
        session = source->of_new_backend(device);
    }
    if (backend != nullptr && session != nullptr) {
        decorate(backend, session);
    }
    return backend;
}

// A cache in system memory beside weights on a GPU (offload_kqv=False): llama.cpp would copy all of K and V to the GPU
// for every token. Where the session attends few of the cells, the CPU does it, as if the GPU had no such operation.
bool device_supports_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    int32_t             layer = 0;
    const ggml_tensor * root = op->op == GGML_OP_FLASH_ATTN_EXT ? cache_root(before_cast(op->src[1]), &layer) : nullptr;
    if (root != nullptr && root->buffer != nullptr && ggml_backend_buffer_is_host(root->buffer)) {
        Session * session = armed;
        {
            const std::lock_guard<std::mutex> lock(registry().mutex);
            if (session != nullptr) {
                registry().host_caches[root->buffer] = session;
            } else {
                const auto it = registry().host_caches.find(root->buffer);
                session       = it != registry().host_caches.end() ? it->second : nullptr;
            }
        }
        if (session != nullptr && session->wants(op)) {
            return false;
        }
    }
    return find(registry().inner_supports, device)(device, op);
}

ggml_backend_dev_t cpu_device() {
    const ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (device == nullptr) {
        fail(FASA_STATUS_HOST, "llama.cpp offers no CPU device; use a build of llama-cpp-python with the CPU backend.");
    }
    return device;
}

// The CPU device, and the CUDA devices when there are kernels for them.
std::vector<ggml_backend_dev_t> devices() {
    std::vector<ggml_backend_dev_t> found = {cpu_device()};
    for (size_t i = 0; gpu::api() != nullptr && i < ggml_backend_dev_count(); ++i) {
        if (gpu::is_cuda(ggml_backend_dev_get(i))) {
            found.push_back(ggml_backend_dev_get(i));
        }
    }
    return found;
}

// The name of the library that holds a code address; empty when it is not in one.
const char * library_of(const void * address) {
    Dl_info info;
    return dladdr(address, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

template <typename F> const char * library_of_slot(F * slot) {
    return library_of(reinterpret_cast<const void *>(slot));
}

// Nothing is called through a mirrored slot until its value has been seen to point into the backend's library.
void check_device(ggml_backend_dev_t device) {
    const seam::DeviceInterface & iface = seam::of(device)->iface;
    const std::string             home  = library_of_slot(iface.get_name);
    const InitBackend             init  = init_slot(iface);
    const bool slots = !home.empty() && home == library_of_slot(iface.get_description) &&
                       home == library_of_slot(iface.get_type) &&
                       (init == device_init_backend || home == library_of_slot(init)) &&
                       (iface.supports_op == device_supports_op || home == library_of_slot(iface.supports_op));
    if (!slots || std::strcmp(iface.get_name(device), ggml_backend_dev_name(device)) != 0 ||
        std::strcmp(iface.get_description(device), ggml_backend_dev_description(device)) != 0) {
        fail(FASA_STATUS_HOST,
             "A device of this ggml %s build is laid out differently from the one pyfasa knows; "
             "decoding stays dense. Install the llama-cpp-python that pyfasa names.",
             fasa_ggml_loaded()); // its name would be asked of a slot that is not its own
    }
}

// Under the registry's lock.
void decorate_devices() {
    for (const ggml_backend_dev_t device : devices()) {
        seam::DeviceInterface & iface = seam::of(device)->iface;
        if (init_slot(iface) != device_init_backend) {
            registry().inner_inits[device] = init_slot(iface);
            if (gpu::is_cuda(device)) {
                registry().inner_supports[device] = iface.supports_op;
                __atomic_store_n(&iface.supports_op, &device_supports_op, __ATOMIC_RELEASE);
            }
            set_init_slot(iface, device_init_backend);
        }
    }
}

} // namespace

// ---- attach and detach ---------------------------------------------------------------------------------------

void check_seam() {
    const char * built  = fasa_ggml_built();
    const char * loaded = fasa_ggml_loaded();
    if (std::strcmp(built, loaded) != 0) {
        fail(FASA_STATUS_HOST,
             "pyfasa was built for ggml %s, but ggml %s is loaded; install the llama-cpp-python that pyfasa names, or "
             "rebuild pyfasa against yours.",
             built, loaded);
    }
    for (const ggml_backend_dev_t device : devices()) {
        check_device(device);
    }
}

void register_session(Session * session) {
    check_seam();
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().sessions[session] = 1;
    decorate_devices();
}

void serve_all(const SessionSource * source) {
    if (source != nullptr) {
        register_session(nullptr); // as long as one is registered, devices stay decorated
    } else {
        unregister_session(nullptr);
    }
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().source = source;
}

void unregister_session(Session * session) {
    Registry &                        r = registry();
    const std::lock_guard<std::mutex> lock(r.mutex);
    for (auto it = r.backends.begin(); it != r.backends.end();) {
        if (it->second.session == session) {
            seam::of(it->first)->iface = it->second.inner;
            it                         = r.backends.erase(it);
        } else {
            ++it;
        }
    }
    for (auto it = r.buffers.begin(); it != r.buffers.end();) {
        if (it->second.session == session) {
            seam::of(it->first)->iface = it->second.inner;
            it                         = r.buffers.erase(it);
        } else {
            ++it;
        }
    }
    for (auto it = r.host_caches.begin(); it != r.host_caches.end();) {
        it = it->second == session ? r.host_caches.erase(it) : std::next(it);
    }
    armed = armed == session ? nullptr : armed;
    r.sessions.erase(session);
    if (r.sessions.empty()) {
        for (const auto & entry : r.inner_inits) {
            set_init_slot(seam::of(entry.first)->iface, entry.second);
        }
        for (const auto & entry : r.inner_supports) {
            __atomic_store_n(&seam::of(entry.first)->iface.supports_op, entry.second, __ATOMIC_RELEASE);
        }
    }
}

void arm(Session * session) { armed = session; }

int backends_of(const Session * session) {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    int                               n = 0;
    for (const auto & entry : registry().backends) {
        n += entry.second.session == session ? 1 : 0;
    }
    return n;
}

bool watch_buffer(ggml_backend_buffer_t buffer, Session * session) {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    const auto                        watched = registry().buffers.find(buffer);
    if (watched != registry().buffers.end()) {
        return watched->second.session == session;
    }
    seam::BufferInterface & iface = seam::of(buffer)->iface;
    registry().buffers[buffer]    = {iface, session};
    const auto hook               = [](auto & slot, auto function) {
        slot = slot != nullptr ? function : nullptr; // optional slots stay empty: ggml tests for NULL
    };
    hook(iface.free_buffer, buffer_free);
    hook(iface.memset_tensor, buffer_memset_tensor);
    hook(iface.set_tensor, buffer_set_tensor);
    hook(iface.set_tensor_2d, buffer_set_tensor_2d);
    hook(iface.cpy_tensor, buffer_cpy_tensor);
    hook(iface.clear, buffer_clear);
    iface.reset = buffer_reset;
    return true;
}

} // namespace fasa

const char * fasa_ggml_built(void) { return FASA_GGML_BUILT; }

const char * fasa_ggml_loaded(void) { return ggml_version(); }
