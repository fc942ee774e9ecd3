// How fast rows of K and V come to a device when the cache is in system memory, as CSV: read by a kernel out of pinned
// memory, where the selection says, or copied in one piece. This decides where attention runs with offload_kqv=False:
// what a device would fetch for a node is bytes_per_node, and must take less time than the CPU's attend.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

namespace {

constexpr int     kHeads = 32, kBudget = 2048, kRuns = 9;
constexpr int     kLanes = 8, kThreads = 128, kAtOnce = 8; // lanes of a row, rows of a lane that are under way together
constexpr int64_t kCache = int64_t{1} << 30;               // bytes: far more than any cache holds

void check(cudaError_t error) {
    if (error != cudaSuccess) {
        std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
        std::exit(1);
    }
}

// Rows are read in pieces of 4 bytes, as quantized ones have to be, or of 16. Each row has a place of its own in `out`.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather(const uint8_t * cache, const int32_t * rows, int n_row, int row_bytes, uint32_t * out) {
    const int lane = threadIdx.x % kLanes, group = (blockIdx.x * kThreads + threadIdx.x) / kLanes;
    uint32_t  sum = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const int       row = min(group * kAtOnce + i, n_row - 1);
        const uint8_t * at  = cache + int64_t{rows[row]} * row_bytes;
        for (int b = lane * static_cast<int>(sizeof(T)); b < row_bytes; b += kLanes * static_cast<int>(sizeof(T))) {
            const T          x     = *reinterpret_cast<const T *>(at + b);
            const uint32_t * words = reinterpret_cast<const uint32_t *>(&x);
            for (int j = 0; j < static_cast<int>(sizeof(T) / 4); ++j) {
                sum += words[j];
            }
        }
    }
    out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

template <typename F> double median_ms(F && run) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < kRuns; ++i) {
        check(cudaEventRecord(begin));
        run();
        check(cudaEventRecord(end));
        check(cudaEventSynchronize(end));
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end));
        times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[kRuns / 2];
}

void print(const char * how, const char * type, int64_t bytes, double ms, const char * machine) {
    std::printf("%s,%s,%lld,%.1f,%.1f,%s\n", how, type, static_cast<long long>(bytes), 1e3 * ms,
                static_cast<double>(bytes) / ms * 1e-6, machine);
}

} // namespace

int main() {
    uint8_t *  host = nullptr, *device = nullptr;
    int32_t *  rows    = nullptr;
    uint32_t * out     = nullptr;
    const int  n_row   = 2 * kHeads * kBudget; // K and V
    const int  n_block = (n_row / kAtOnce * kLanes + kThreads - 1) / kThreads;
    check(cudaMallocHost(&host, kCache));
    check(cudaMalloc(&device, kCache / 4));
    check(cudaMalloc(&rows, n_row * sizeof(int32_t)));
    check(cudaMalloc(&out, static_cast<size_t>(n_block) * kThreads * sizeof(uint32_t)));
    for (int64_t i = 0; i < kCache; i += 4096) {
        host[i] = static_cast<uint8_t>(i >> 12);
    }
    std::mt19937   rng(1);
    cudaDeviceProp device_is;
    check(cudaGetDeviceProperties(&device_is, 0));
    std::printf("how,type,bytes_per_node,time_us,gb_per_s,machine\n");
    for (const auto & format : {std::pair{"f16", 256}, std::pair{"q8_0", 136}}) {
        const char *         type      = format.first;
        const int            row_bytes = format.second; // a lambda takes names, no parts of a binding, before C++20
        std::vector<int32_t> chosen(n_row);
        for (int32_t & row : chosen) {
            row = static_cast<int32_t>(rng() % (kCache / row_bytes));
        }
        check(cudaMemcpy(rows, chosen.data(), n_row * sizeof(int32_t), cudaMemcpyHostToDevice));
        const int64_t bytes = int64_t{n_row} * row_bytes;
        print("rows", type, bytes, median_ms([&] {
                  if (row_bytes % 16 == 0) {
                      gather<uint4><<<n_block, kThreads>>>(host, rows, n_row, row_bytes, out);
                  } else {
                      gather<uint32_t><<<n_block, kThreads>>>(host, rows, n_row, row_bytes, out);
                  }
                  check(cudaGetLastError());
              }),
              device_is.name);
        print("one piece", type, bytes,
              median_ms([&] { check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice)); }), device_is.name);
    }
    return 0;
}
