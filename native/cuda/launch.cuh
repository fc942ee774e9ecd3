// Launches, also such that begin while the kernel in front of them ends (programmatic dependent launches, from sm_90
// on; else in turn).
#pragma once

#include "ptx.cuh"

namespace fasa::gpu {

// Where kernels are launched, and what their device has.
struct Queue {
    cudaStream_t stream;
    bool         is_hopper; // sm_90 or newer, and so is the code: a device may run code that is older than it
    int          n_cluster; // of select's thread blocks, by twos, for which there is room at once
    int          n_multiprocessor;
    int64_t      l2_bytes;
};

// One that may begin early, and of how many thread blocks a cluster is. Both from sm_90 on.
struct LaunchAttributes {
    cudaLaunchAttribute all[2] = {};

    LaunchAttributes(bool early, unsigned cluster) {
        all[0].id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
        all[0].val.programmaticStreamSerializationAllowed = early ? 1 : 0;
        all[1].id                                         = cudaLaunchAttributeClusterDimension;
        all[1].val.clusterDim.x                           = cluster;
        all[1].val.clusterDim.y = all[1].val.clusterDim.z = 1;
    }
};

// early: the kernel waits by wait_for_kernel_before() where it must. cluster: thread blocks of one; more than one only
// where `is_hopper`.
template <typename... Parameters>
cudaError_t launch_clusters(const Queue & queue, unsigned cluster, void (*kernel)(Parameters...), dim3 grid,
                            int threads, size_t shared_bytes, bool early, const Parameters &... arguments) {
    LaunchAttributes   attributes(early, cluster);
    cudaLaunchConfig_t config = {};
    config.gridDim            = grid;
    config.blockDim           = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes   = shared_bytes;
    config.stream             = queue.stream;
    config.attrs              = attributes.all;
    config.numAttrs           = !queue.is_hopper ? 0 : cluster > 1 ? 2 : 1;
    const cudaError_t error   = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) {
        cudaGetLastError(); // else llama.cpp finds it behind its own next launch, and ends the process
    }
    return error;
}

template <typename... Parameters>
cudaError_t launch(const Queue & queue, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   bool early, const Parameters &... arguments) {
    return launch_clusters(queue, 1, kernel, grid, threads, shared_bytes, early, arguments...);
}

} // namespace fasa::gpu
