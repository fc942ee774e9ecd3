// Pieces of memory that are copied in one launch.
#pragma once

#include <cstdint>

namespace fasa::gpu {

// Device memory, or page-locked memory of the host. Pointers are those of cell 0.
struct Transfer {
    uint8_t * from;
    uint8_t * to;
    int64_t   bytes;
    int64_t   from_step, to_step; // from one cell to the next
    int32_t   hole;               // bytes per cell: those of the cell become 0, in `from` too; 0: nothing does
};

} // namespace fasa::gpu
