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

inline bool is_hopper_or_newer() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// early: the kernel waits by wait_for_kernel_before() where it must.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   bool early, const Parameters &... arguments) {
    cudaLaunchAttribute attribute                        = {};
    attribute.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config                            = {};
    config.gridDim                                       = grid;
    config.blockDim                                      = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes                              = shared_bytes;
    config.stream                                        = stream;
    config.attrs                                         = &attribute;
    config.numAttrs                                      = early && is_hopper_or_newer() ? 1 : 0;
    const cudaError_t error                              = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) {
        cudaGetLastError(); // else llama.cpp finds it behind its own next launch, and ends the process
    }
    return error;
}

} // namespace fasa::gpu
