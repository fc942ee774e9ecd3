// The phases of a node as launches on one queue, in this order: prepare, score, select, attend. None waits for the
// host. encode writes the index entries of the step's new cells. These are always selected, so that it may come before
// or after the others; what score reads of them does not matter.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"
#include "layout.h"
#include "node.h"
#include "transfer.h"

namespace fasa::gpu {

// The index of all cells that the node sees, from a block on. n_different: compare with what is there instead, and
// count the words that differ.
cudaError_t launch_rebuild(const Node & node, int64_t first_block, int32_t max_block_bytes, int64_t * n_different,
                           const Queue & queue);

cudaError_t launch_prepare(const Node & node, const Queue & queue);
cudaError_t launch_encode(const Node & node, const Queue & queue);
cudaError_t launch_score(const Node & node, const Queue & queue);
cudaError_t launch_select(const Node & node, const Queue & queue);
cudaError_t launch_attend(const Node & node, const Queue & queue);

// Pieces in device memory; back: from where they went to where they came from.
cudaError_t launch_transfer(const Transfer * pieces, int32_t n, int64_t cell, bool back, const Queue & queue);

// Once per device, before the first launch: more shared memory than a kernel gets unasked. Says of what architecture
// the code is that the device runs (all kernels are compiled alike), and how many clusters it has room for.
cudaError_t prepare_select(Queue * queue);

} // namespace fasa::gpu
