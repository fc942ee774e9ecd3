// One attention node with everything it needs in device memory, made from random numbers, and its copy on the host.
#pragma once

#include <ggml.h>

#include <cstring>
#include <memory>
#include <vector>

#include "../../gpu/index.h"
#include "../../gpu/memory.h"
#include "../../tests/harness.h"
#include "half.h"

namespace fasa_test {

using fasa::gpu::Api;
using fasa::gpu::HeadLayout;
using fasa::gpu::Memory;
using fasa::gpu::Node;
using fasa::gpu::Stream;

const Api * cuda_api();

// The device that tests run on.
std::shared_ptr<Stream> cuda_stream();

struct StageShape {
    int32_t   head_dim = 128, n_head = 8, n_head_kv = 2;
    int64_t   n_kv   = 1024;
    int64_t   n_rows = 1, n_stream = 1;
    ggml_type k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16;
    int32_t   bits = 4, n_fc = 32; // bits 0: mixed
    int32_t   budget = 256, min_ctx = 512, n_first = 4, n_last = 32;
    int32_t   rotation = 0;
    float     softcap  = 0.0f;
    bool      sinks    = false;
    bool      small    = false; // one stream, and rows that repeat: quick to make

    std::string text() const;
};

// Device memory and the bytes that were put there.
template <typename T> struct Copied {
    std::vector<T> host;
    Memory<T>      device;

    void to_device() {
        if (device.size() != static_cast<int64_t>(host.size())) {
            device = Memory<T>(cuda_stream(), static_cast<int64_t>(host.size()));
        }
        CHECK_EQUAL(cuda_api()->upload(cuda_stream()->device(), device.get(), host.data(), host.size() * sizeof(T)), 0);
    }
    void to_host() {
        host.resize(device.size());
        CHECK_EQUAL(cuda_api()->download(cuda_stream()->device(), host.data(), device.get(), host.size() * sizeof(T)),
                    0);
    }
    void poison(int64_t n) { // of bytes that are NaN as a float and out of range as an index
        host.resize(n);
        std::memset(host.data(), 0xff, n * sizeof(T));
        to_device();
    }
};

struct Stage {
    StageShape                shape;
    std::vector<fasa::Layout> layouts; // per KV head
    int64_t                   n_cell, n_block, blocks_per_stream, first_stream = 1, cache_streams;

    Copied<uint8_t>           k, v, index;
    Copied<HeadLayout>        heads;
    Copied<float>             q, out, sinks, levels, norms, scores, peaks, parts;
    Copied<fasa::gpu::Filter> thresholds, filters;
    Copied<uint32_t>          marks;
    Copied<uint16_t>          mask;
    Copied<int64_t>           new_cells, totals;
    Copied<int8_t>            codes;
    Copied<fasa::gpu::Window> windows;
    Copied<int32_t>           n_visible, cells, n_selected, arrived;
    Node                      node;

    Stage(std::mt19937 & rng, const StageShape & shape);

    int64_t row_bytes(ggml_type type) const { return static_cast<int64_t>(ggml_row_size(type, shape.head_dim)); }
    int64_t n_query() const { return shape.n_head * shape.n_rows * shape.n_stream; }
    bool    visible(int64_t stream, int64_t row, int64_t cell) const;

    // A key in the RoPE basis, f32 [head_dim]; streams are those of the node.
    std::vector<float> key(int64_t stream, int32_t head, int64_t cell) const;
    uint8_t *          block(std::vector<uint8_t> & bytes, int64_t stream, int32_t head, int64_t block) const;
    void               write_random_rows(std::mt19937 & rng, int64_t cache_cell);
};

} // namespace fasa_test
