// Which query a thread block works on.
#pragma once

#include "node.h"

namespace fasa::gpu {

struct Query {
    int head_kv, head, row, stream, member; // member: of the KV head's group
    int number;                             // as Scratch counts them
};

// Of a grid in which z runs over streams, rows and members of the group, the last innermost. The usual step has one row
// of one stream: it needs no division, which takes longer than the load of a number that is near.
__device__ inline Query query_of(const Node & node, int head_kv, int z) {
    int row = 0, stream = 0;
    if (z >= node.group) {
        const int of_all = z / node.group;
        z -= of_all * node.group;
        stream = of_all / node.n_rows;
        row    = of_all - stream * node.n_rows;
    }
    const int head = head_kv * node.group + z;
    return {head_kv, head, row, stream, z, (stream * node.n_rows + row) * node.n_head + head};
}

__device__ inline const float * values_of(const Node & node, const Query & at) {
    return reinterpret_cast<const float *>(reinterpret_cast<const char *>(node.q) + at.row * node.q_row +
                                           at.head * node.q_head + at.stream * node.q_stream);
}

// The mask of the row, halves of whichever type the caller looks at.
template <typename T> __device__ const T * mask_of(const Node & node, const Query & at) {
    return reinterpret_cast<const T *>(node.mask + at.row * node.mask_row + at.stream * node.mask_stream);
}

} // namespace fasa::gpu
