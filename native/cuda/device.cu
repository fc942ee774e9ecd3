// Devices, memory, events and captured graphs behind the table of api.h.
#include <memory>
#include <new>

#include "api.h"
#include "kernels.cuh"

namespace fasa::gpu {

struct Device {
    int   id;
    Queue queue;
};

struct Capture {
    cudaGraphExec_t exec;
};

namespace {

// llama.cpp has a current device of its own on this thread; it is put back.
class Current {
  public:
    explicit Current(const Device * device) {
        cudaGetDevice(&before_);
        if (before_ != device->id) {
            cudaSetDevice(device->id);
        }
        id_ = device->id;
    }
    ~Current() {
        if (before_ != id_) {
            cudaSetDevice(before_);
        }
    }
    Current(const Current &)             = delete;
    Current & operator=(const Current &) = delete;

  private:
    int before_ = 0, id_ = 0;
};

const char * error_text(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int32_t device_count() {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

const char * architectures() { return FASA_CUDA_ARCHITECTURES; }

// What launches ask of the device.
cudaError_t describe(Device * device) {
    Queue &     queue    = device->queue;
    int         l2_bytes = 0;
    cudaError_t error    = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device->id);
    queue.l2_bytes       = l2_bytes;
    error = error == cudaSuccess
                ? cudaDeviceGetAttribute(&queue.n_multiprocessor, cudaDevAttrMultiProcessorCount, device->id)
                : error;
    return error == cudaSuccess ? prepare_select(&queue) : error;
}

int32_t open(const void * memory, Device ** out) {
    cudaPointerAttributes attributes = {};
    cudaError_t           error      = cudaSuccess;
    if (memory != nullptr) {
        error = cudaPointerGetAttributes(&attributes, memory);
    }
    if (error != cudaSuccess || (memory != nullptr && attributes.type != cudaMemoryTypeDevice)) {
        return error != cudaSuccess ? error : cudaErrorInvalidDevicePointer;
    }
    std::unique_ptr<Device> device(new (std::nothrow) Device{attributes.device, {}});
    if (device == nullptr) {
        return cudaErrorMemoryAllocation;
    }
    const Current current(device.get());
    error = cudaStreamCreateWithFlags(&device->queue.stream, cudaStreamNonBlocking);
    error = error == cudaSuccess ? describe(device.get()) : error;
    if (error == cudaSuccess) {
        *out = device.release();
        return cudaSuccess;
    }
    if (device->queue.stream != nullptr) {
        cudaStreamDestroy(device->queue.stream);
    }
    cudaGetLastError(); // a device that is not served is not an error of llama.cpp's next launch
    return error;
}

void close(Device * device) {
    {
        const Current current(device);
        cudaStreamSynchronize(device->queue.stream);
        cudaStreamDestroy(device->queue.stream);
    }
    delete device;
}

int32_t allocate(Device * device, size_t bytes, void ** out) {
    const Current current(device);
    cudaError_t   error = cudaMalloc(out, bytes);
    if (error != cudaSuccess) {
        cudaGetLastError(); // an allocation that failed is not an error of the next launch
        return error;
    }
    error = cudaMemsetAsync(*out, 0, bytes, device->queue.stream);
    return error == cudaSuccess ? cudaStreamSynchronize(device->queue.stream) : error;
}

void release(Device * device, void * memory) {
    const Current current(device);
    cudaStreamSynchronize(device->queue.stream);
    cudaFree(memory);
}

int32_t upload(Device * device, void * to, const void * from, size_t bytes) {
    const Current current(device);
    const auto    error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, device->queue.stream);
    return error == cudaSuccess ? cudaStreamSynchronize(device->queue.stream) : error;
}

int32_t download(Device * device, void * to, const void * from, size_t bytes) {
    const Current current(device);
    const auto    error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, device->queue.stream);
    return error == cudaSuccess ? cudaStreamSynchronize(device->queue.stream) : error;
}

int32_t copy(Device * device, void * to, const void * from, size_t bytes) {
    const Current current(device);
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, device->queue.stream);
}

int32_t allocate_host(Device * device, size_t bytes, void ** out) {
    const Current     current(device);
    const cudaError_t error = cudaMallocHost(out, bytes);
    if (error != cudaSuccess) {
        cudaGetLastError();
    }
    return error;
}

void release_host(Device * device, void * memory) {
    const Current current(device);
    cudaStreamSynchronize(device->queue.stream);
    cudaFreeHost(memory);
}

int32_t transfer(Device * device, const Transfer * pieces, int32_t n, int64_t cell, int32_t back) {
    const Current current(device);
    return launch_transfer(pieces, n, cell, back != 0, device->queue);
}

bool is_idle(Device * device) {
    const Current     current(device);
    const cudaError_t error = cudaStreamQuery(device->queue.stream);
    if (error != cudaSuccess) {
        cudaGetLastError(); // that it is busy is no error
    }
    return error == cudaSuccess;
}

int32_t wait(Device * device) {
    const Current current(device);
    return cudaStreamSynchronize(device->queue.stream);
}

int32_t wait_event(Device * device, void * event) {
    const Current current(device);
    return cudaStreamWaitEvent(device->queue.stream, static_cast<cudaEvent_t>(event), 0);
}

int32_t record_event(Device * device, void * event) {
    const Current current(device);
    return cudaEventRecord(static_cast<cudaEvent_t>(event), device->queue.stream);
}

int32_t rebuild(Device * device, const Node * node, int64_t first_block, int32_t max_block_bytes,
                int64_t * n_different) {
    const Current current(device);
    return launch_rebuild(*node, first_block, max_block_bytes, n_different, device->queue);
}

template <cudaError_t (*LAUNCH)(const Node &, const Queue &)> int32_t phase(Device * device, const Node * node) {
    const Current current(device);
    return LAUNCH(*node, device->queue);
}

// Relaxed: other threads, and llama.cpp's own calls on this one, may allocate meanwhile.
int32_t begin_capture(Device * device) {
    const Current current(device);
    return cudaStreamBeginCapture(device->queue.stream, cudaStreamCaptureModeRelaxed);
}

int32_t end_capture(Device * device, Capture ** inout) {
    const Current current(device);
    cudaGraph_t   graph = nullptr;
    cudaError_t   error = cudaStreamEndCapture(device->queue.stream, &graph);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
    }
    if (*inout != nullptr) {
        cudaGraphExecUpdateResultInfo info;
        if (cudaGraphExecUpdate((*inout)->exec, graph, &info) == cudaSuccess) {
            cudaGraphDestroy(graph);
            return cudaSuccess;
        }
        cudaGetLastError(); // another topology: it is made anew
        cudaGraphExecDestroy((*inout)->exec);
        delete *inout;
        *inout = nullptr;
    }
    cudaGraphExec_t exec = nullptr;
    error                = cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphDestroy(graph);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
    }
    *inout = new (std::nothrow) Capture{exec};
    return *inout != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}

int32_t launch(Device * device, Capture * capture) {
    const Current current(device);
    return cudaGraphLaunch(capture->exec, device->queue.stream);
}

void free_capture(Capture * capture) {
    cudaGraphExecDestroy(capture->exec);
    delete capture;
}

constexpr Api kApi = {kApiVersion,
                      sizeof(Node),
                      error_text,
                      device_count,
                      architectures,
                      open,
                      close,
                      allocate,
                      release,
                      upload,
                      download,
                      copy,
                      allocate_host,
                      release_host,
                      transfer,
                      is_idle,
                      wait,
                      wait_event,
                      record_event,
                      rebuild,
                      phase<launch_prepare>,
                      phase<launch_encode>,
                      phase<launch_score>,
                      phase<launch_select>,
                      phase<launch_attend>,
                      begin_capture,
                      end_capture,
                      launch,
                      free_capture};

} // namespace

} // namespace fasa::gpu

extern "C" __attribute__((visibility("default"))) const fasa::gpu::Api * fasa_cuda_api() { return &fasa::gpu::kApi; }
