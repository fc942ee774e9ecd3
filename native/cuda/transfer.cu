// transfer: pieces of memory are copied, each by some thread blocks of its own. What a graph needs to begin early comes
// in with one launch, and so does what a wrong guess has overwritten.
#include "kernels.cuh"

namespace fasa::gpu {

namespace {

constexpr int kThreads = 256;
constexpr int kBlocks  = 32; // of a piece: a mask of 131,072 cells in two turns

// The unit's bytes that belong to the hole become 0 before they are read.
__device__ void dig(uint8_t * from, int64_t unit, int64_t unit_bytes, int64_t hole, int hole_bytes) {
    for (int64_t i = max(unit, hole); i < min(unit + unit_bytes, hole + hole_bytes); ++i) {
        from[i] = 0;
    }
}

template <typename Unit> __device__ void copy(const Transfer & t, uint8_t * from, uint8_t * to, int64_t cell) {
    const int64_t size = sizeof(Unit), step = static_cast<int64_t>(gridDim.x) * kThreads * size;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * size; i < t.bytes; i += step) {
        dig(from, i, size, cell * t.hole, t.hole);
        *reinterpret_cast<Unit *>(to + i) = *reinterpret_cast<const Unit *>(from + i);
    }
}

// Grid: parts of a piece; pieces.
__global__ void __launch_bounds__(kThreads) transfer_kernel(const Transfer * pieces, int64_t cell, bool back) {
    const Transfer  t     = pieces[blockIdx.y];
    uint8_t * const from  = t.from + cell * t.from_step;
    uint8_t * const to    = t.to + cell * t.to_step;
    const bool      whole = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | t.bytes) & 15) == 0;
    if (whole) {
        copy<uint4>(t, back ? to : from, back ? from : to, cell);
    } else {
        copy<uint8_t>(t, back ? to : from, back ? from : to, cell);
    }
}

} // namespace

cudaError_t launch_transfer(const Transfer * pieces, int32_t n, int64_t cell, bool back, const Queue & queue) {
    const dim3 grid(kBlocks, n);
    return launch(queue, transfer_kernel, grid, kThreads, 0, false, pieces, cell, back);
}

} // namespace fasa::gpu
