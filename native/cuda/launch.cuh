// Launches, also such that begin while the kernel in front of them ends (programmatic dependent launches, from sm_90
// on; else in turn).
#pragma once

#include "ptx.cuh"

namespace fasa::gpu {

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
}

// A device may run code that was compiled for an older one, which lacks what ptx.cuh has for newer ones.
template <typename Kernel> bool has_code_of_hopper(Kernel * kernel) {
    cudaFuncAttributes attributes = {};
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// early: the kernel waits by wait_for_kernel_before() where it must. cluster: thread blocks of one; more than one only
// for a kernel that has_code_of_hopper.
template <typename... Parameters>
cudaError_t launch_clusters(unsigned cluster, void (*kernel)(Parameters...), dim3 grid, int threads,
                            size_t shared_bytes, cudaStream_t stream, bool early, const Parameters &... arguments) {
    cudaLaunchAttribute attributes[2]                        = {};
    attributes[0].id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = early ? 1 : 0;
    attributes[1].id                                         = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x                           = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config                                       = {};
    config.gridDim                                                  = grid;
    config.blockDim                                                 = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes                                         = shared_bytes;
    config.stream                                                   = stream;
    config.attrs                                                    = attributes;
    config.numAttrs         = !has_code_of_hopper(kernel) ? 0 : cluster > 1 ? 2 : 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) {
        cudaGetLastError(); // else llama.cpp finds it behind its own next launch, and ends the process
    }
    return error;
}

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   bool early, const Parameters &... arguments) {
    return launch_clusters(1, kernel, grid, threads, shared_bytes, stream, early, arguments...);
}

} // namespace fasa::gpu
