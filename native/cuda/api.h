// What libpyfasa_cuda.so offers to the core: one table of functions. The core itself is built and linked without CUDA.
//
// Functions return 0 or a CUDA error; none aborts. Work is asynchronous on the device's own stream unless said
// otherwise.
#pragma once

#include <cstddef>

#include "node.h"
#include "transfer.h"

namespace fasa::gpu {

constexpr int32_t kApiVersion = 4;

struct Device;  // a CUDA device: its stream
struct Capture; // a captured graph of kernels, ready to be launched

struct Api {
    int32_t version;
    int32_t node_bytes; // sizeof(Node): both sides must have been built from the same header

    const char * (*error_text)(int32_t error);
    int32_t (*device_count)();
    const char * (*architectures)(); // what the kernels were compiled for, as in "75;80;90"

    // The device that holds `memory`; nullptr: the first one.
    int32_t (*open)(const void * memory, Device ** out);
    void (*close)(Device * device); // waits for its work

    int32_t (*allocate)(Device * device, size_t bytes, void ** out);                  // zeroed; waits
    void (*release)(Device * device, void * memory);                                  // waits
    int32_t (*upload)(Device * device, void * to, const void * from, size_t bytes);   // waits
    int32_t (*download)(Device * device, void * to, const void * from, size_t bytes); // waits for all work before it
    int32_t (*copy)(Device * device, void * to, const void * from, size_t bytes);     // inside the device
    int32_t (*allocate_host)(Device * device, size_t bytes, void ** out); // page-locked: kernels may read it
    void (*release_host)(Device * device, void * memory);                 // waits
    int32_t (*transfer)(Device * device, const Transfer * pieces, int32_t n, int64_t cell, int32_t back);
    bool (*is_idle)(Device * device);
    int32_t (*wait)(Device * device);

    // cudaEvent_t of ggml: orders the two streams.
    int32_t (*wait_event)(Device * device, void * event);
    int32_t (*record_event)(Device * device, void * event);

    int32_t (*rebuild)(Device * device, const Node * node, int64_t first_block, int32_t max_block_bytes,
                       int64_t * n_different);
    int32_t (*prepare)(Device * device, const Node * node);
    int32_t (*encode)(Device * device, const Node * node);
    int32_t (*score)(Device * device, const Node * node);
    int32_t (*select)(Device * device, const Node * node);
    int32_t (*attend)(Device * device, const Node * node);

    int32_t (*begin_capture)(Device * device);
    int32_t (*end_capture)(Device * device, Capture ** inout); // updates *inout, or makes it when nullptr
    int32_t (*launch)(Device * device, Capture * capture);
    void (*free_capture)(Capture * capture);
};

using ApiFunction = const Api * (*)();

constexpr char kApiSymbol[] = "fasa_cuda_api";

} // namespace fasa::gpu
