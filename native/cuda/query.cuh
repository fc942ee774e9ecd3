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

} // namespace fasa::gpu
