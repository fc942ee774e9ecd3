// Launches that begin while the kernel in front of them ends (programmatic dependent launches, from sm_90 on; else in
// turn).
#pragma once

#include <cuda_runtime.h>

namespace fasa::gpu {

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
}

inline bool is_hopper_or_newer() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// In a kernel of launch_early: what the kernels in front write may be read from here on, and what they read written.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all thread blocks have said so, those of a kernel of launch_early behind this one take places that are free.
__device__ inline void let_kernel_behind_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <typename... Parameters>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                         cudaStream_t stream, const Parameters &... arguments) {
    cudaLaunchAttribute early                        = {};
    early.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config                        = {};
    config.gridDim                                   = grid;
    config.blockDim                                  = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes                          = shared_bytes;
    config.stream                                    = stream;
    config.attrs                                     = &early;
    config.numAttrs                                  = is_hopper_or_newer() ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

} // namespace fasa::gpu
