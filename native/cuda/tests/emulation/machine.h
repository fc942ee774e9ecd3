// What a detector of races (races.cpp) and a device (device.cpp) ask of the emulation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulation {

// Everything runs at once, in its order, but what is captured, which runs when it is launched. 0, or an error.
using Work = std::vector<std::function<int32_t()>>;
int32_t run_now_or_later(std::function<int32_t()> step);

// Who runs, and how many barriers are behind: of the cluster, of the block, and __syncwarp of the warp.
struct Moment {
    int thread, warp, block, cluster_turn, block_turn, warp_turn;
};

bool        is_running(uint32_t * run, Moment * moment); // false outside kernels; run: number of the cluster, from 1 on
bool        is_on_stack(const void * p);                 // of the running thread: nobody else's
std::string place_of(const void * p);
void        report(const std::string & error); // the first one ends the test

} // namespace emulation
