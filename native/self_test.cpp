// The proof at attach: one decode step of a tiny attention graph on a decorated backend, compared with the same graph
// on an undecorated one.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <cmath>
#include <memory>
#include <vector>

#include "backend.h"
#include "session.h"
#include "status.h"

namespace fasa {

namespace {

constexpr int    kHeadDim = 32;
constexpr int    kHeads   = 4;
constexpr int    kHeadsKv = 2;
constexpr int    kCells   = 256;
constexpr int    kSeen    = 200;
constexpr double kMaxNmse = 5e-4; // what llama.cpp allows between its own backends for flash attention

// Any fixed, aperiodic values.
void fill(ggml_tensor * t, float shift) {
    const int64_t      n = ggml_nelements(t);
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; ++i) {
        x[i] = std::sin(static_cast<float>(i) * 0.7f + shift) + 0.5f * std::sin(static_cast<float>(i * i % 1009));
    }
    if (t->type == GGML_TYPE_F32) {
        ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
    } else {
        std::vector<ggml_fp16_t> h(n);
        ggml_fp32_to_fp16_row(x.data(), h.data(), n);
        ggml_backend_tensor_set(t, h.data(), 0, ggml_nbytes(t));
    }
}

std::vector<float> run_graph(ggml_backend_t backend) {
    const ggml_init_params params = {1 << 20, nullptr, true};
    const ggml_context_ptr ctx(ggml_init(params));
    ggml_context *         c       = ctx.get();
    ggml_tensor *          k_cache = ggml_new_tensor_2d(c, GGML_TYPE_F16, kHeadDim * kHeadsKv, kCells);
    ggml_tensor *          v_cache = ggml_new_tensor_2d(c, GGML_TYPE_F16, kHeadDim * kHeadsKv, kCells);
    ggml_tensor *          q       = ggml_new_tensor_4d(c, GGML_TYPE_F32, kHeadDim, 1, kHeads, 1);
    ggml_tensor *          mask    = ggml_new_tensor_4d(c, GGML_TYPE_F16, kCells, 1, 1, 1);
    ggml_set_name(k_cache, "cache_k_l0");
    ggml_set_name(v_cache, "cache_v_l0");
    const auto view = [&](ggml_tensor * cache) {
        return ggml_permute(
            c, ggml_view_4d(c, cache, kHeadDim, kHeadsKv, kCells, 1, kHeadDim * 2, cache->nb[1], cache->nb[2], 0), 0, 2,
            1, 3);
    };
    ggml_tensor * out =
        ggml_flash_attn_ext(c, q, view(k_cache), view(v_cache), mask, 1.0f / std::sqrt(float(kHeadDim)), 0.0f, 0.0f);
    ggml_cgraph * graph = ggml_new_graph(c);
    ggml_build_forward_expand(graph, out);
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(c, backend));
    if (buffer == nullptr) {
        fail(FASA_STATUS_MEMORY, "The attach self-test could not allocate its tensors.");
    }
    fill(k_cache, 0.1f);
    fill(v_cache, 0.2f);
    fill(q, 0.3f);
    std::vector<ggml_fp16_t> seen(kCells, ggml_fp32_to_fp16(-INFINITY));
    std::fill(seen.begin(), seen.begin() + kSeen, ggml_fp32_to_fp16(0.0f));
    ggml_backend_tensor_set(mask, seen.data(), 0, ggml_nbytes(mask));
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        fail(FASA_STATUS_HOST, "The attach self-test's graph failed to compute.");
    }
    std::vector<float> result(ggml_nelements(out));
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    return result;
}

ggml_backend_ptr new_backend() {
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (backend == nullptr) {
        fail(FASA_STATUS_HOST, "The attach self-test could not create a CPU backend.");
    }
    // One thread: OpenMP's workers do not survive a fork, and a child may make a model that needs none.
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    const auto               set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
    if (set != nullptr) {
        set(backend.get(), 1);
    }
    return backend;
}

} // namespace

void self_test() {
    check_seam();
    const std::vector<float> expected = run_graph(new_backend().get());

    std::vector<uint16_t> chunks;
    for (int h = 0; h < kHeadsKv; ++h) {
        for (uint16_t i = 0; i < kHeadDim / 2; ++i) {
            chunks.push_back(i);
        }
    }
    const std::vector<uint8_t> bits(chunks.size(), 4);
    const fasa_profile         profile = {
        1, kHeadsKv, kHeadDim, kHeadDim, FASA_ROPE_NORM, kHeadDim / 2, chunks.data(), bits.data(), nullptr, nullptr};
    fasa_config config = {};
    config.enabled     = 1;
    config.budget      = kCells;
    config.max_rows    = 1;
    config.isa         = FASA_ISA_AUTO;
    Session session(&profile, config);
    register_session(&session);
    struct Guard {
        Session * s;
        ~Guard() { unregister_session(s); }
    } const guard{&session};
    arm(&session);
    ggml_backend_ptr decorated = new_backend();
    arm(nullptr);
    const std::vector<float> actual = run_graph(decorated.get());
    if (session.counters().nodes[FASA_REASON_SPARSE] != 1) {
        fail(FASA_STATUS_HOST,
             "The attach self-test's attention node was not replaced; this build of llama.cpp does not "
             "call the decorated backend. Decoding stays dense.");
    }
    double error = 0;
    double power = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        error += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
        power += std::pow(static_cast<double>(expected[i]), 2);
    }
    if (!(error <= kMaxNmse * power)) {
        fail(FASA_STATUS_HOST,
             "The attach self-test's attention differs from llama.cpp's by NMSE %.2g, above %.2g. "
             "Decoding stays dense.",
             error / power, kMaxNmse);
    }
}

} // namespace fasa

fasa_status fasa_self_test(void) { return fasa::guarded(fasa::self_test); }
