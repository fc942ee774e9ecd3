// Times each stage of a decode step and prints CSV: bytes it must move, the time they take at a given bandwidth, its
// time.
//   fasa_cuda_bench [TB/s [depth]]
// Layers take turns, so that no stage finds its input in the L2 cache; one graph launch holds all repetitions.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "kernels.h"
#include "kv_type.h"
#include "stage.h"

using namespace fasa_test;

namespace {

constexpr int kLayers  = 4;
constexpr int kRepeats = 25; // of all layers
constexpr int kRuns    = 7;

using Phase = int32_t (*)(fasa::gpu::Device *, const Node *);

double median_us(const std::vector<std::unique_ptr<Stage>> & layers, const std::vector<Phase> & phases) {
    auto *               device  = cuda_stream()->device();
    fasa::gpu::Capture * capture = nullptr;
    std::vector<double>  times;
    const auto           wait = [&] { layers[0]->totals.to_host(); };
    CHECK_EQUAL(cuda_api()->begin_capture(device), 0);
    for (int i = 0; i < kRepeats * kLayers; ++i) {
        for (const Phase phase : phases) {
            CHECK_EQUAL(phase(device, &layers[i % kLayers]->node), 0);
        }
    }
    CHECK_EQUAL(cuda_api()->end_capture(device, &capture), 0);
    for (int run = 0; run < kRuns; ++run) {
        wait();
        const auto start = std::chrono::steady_clock::now();
        CHECK_EQUAL(cuda_api()->launch(device, capture), 0);
        wait();
        const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - start;
        times.push_back(us.count() / (kRepeats * kLayers));
    }
    cuda_api()->free_capture(capture);
    std::sort(times.begin(), times.end());
    return times[kRuns / 2];
}

} // namespace

int main(int argc, char ** argv) {
    const double  tera = argc > 1 ? std::atof(argv[1]) : 3.0;
    const int64_t only = argc > 2 ? std::atoll(argv[2]) : 0;
    std::printf("type,n_depth,bits,budget,stage,bytes,floor_us,time_us,ratio\n");
    for (const ggml_type type : {GGML_TYPE_Q8_0, GGML_TYPE_F16}) {
        for (const int64_t depth : {4096, 32768, 131072}) {
            for (const int32_t bits : {4, 2}) {
                if ((type == GGML_TYPE_F16 && bits == 2) || (only != 0 && depth != only)) {
                    continue;
                }
                std::mt19937 rng(1);
                StageShape   shape = {128, 32, 8, depth, 1, 1, type, type, bits, 32};
                shape.budget       = 2048;
                shape.min_ctx      = std::min<int32_t>(4096, static_cast<int32_t>(depth) / 2);
                shape.rotation     = type == GGML_TYPE_F16 ? 0 : 128;
                shape.small        = true;
                std::vector<std::unique_ptr<Stage>> layers;
                int64_t                             index = 0;
                for (int i = 0; i < kLayers; ++i) {
                    layers.push_back(std::make_unique<Stage>(rng, shape));
                    layers[i]->node.scratch = layers[0]->node.scratch; // as in a model
                    CHECK_EQUAL(cuda_api()->rebuild(cuda_stream()->device(), &layers[i]->node, 0, 20000, nullptr), 0);
                }
                for (auto & l : layers) {
                    l->node.n_new = 1;
                }
                for (const auto & l : layers[0]->layouts) {
                    index += l.block_bytes * layers[0]->n_block;
                }
                const int64_t rows     = fasa::kv_row_bytes(type, 128) * 2;
                const int64_t attended = 32 * 2048 * rows;
                const int64_t chosen = 32 * (depth / 8 * 4 + 2048 * 32); // peaks, and the scores under the best of them
                const auto    print  = [&](const char * stage, int64_t bytes, const std::vector<Phase> & phases) {
                    const double floor = static_cast<double>(bytes) / tera * 1e-6;
                    const double time  = median_us(layers, phases);
                    std::printf("%s,%lld,%d,2048,%s,%lld,%.2f,%.2f,%.2f\n", ggml_type_name(type),
                                static_cast<long long>(depth), bits, stage, static_cast<long long>(bytes), floor, time,
                                time / floor);
                    std::fflush(stdout);
                };
                const Api * api  = cuda_api();
                const auto  once = [&](const std::vector<Phase> & phases) {
                    for (const Phase phase : phases) {
                        CHECK_EQUAL(phase(cuda_stream()->device(), &layers[0]->node), 0);
                    }
                };
                // As decoding runs: select takes the cells that score marks.
                print("all", index + 2 * depth + chosen + attended,
                      {api->prepare, api->score, api->select, api->attend});
                print("encode", 8 * (rows / 2 + 34), {api->encode});
                print("attend", attended, {api->attend});
                print("prepare", 32 * 128 * 4, {api->prepare});
                print("score", index + 2 * depth, {api->score});
                once({api->prepare, api->score});
                print("select", chosen, {api->select});
            }
        }
    }
    return 0;
}
