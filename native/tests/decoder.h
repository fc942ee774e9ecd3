// A decoder that is all attention: one layer's K and V cache on a CPU backend, and graphs as llama.cpp builds them.
#pragma once

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "fasa.h"
#include "harness.h"

namespace fasa_test {

struct SessionFree {
    void operator()(fasa_session * s) const { fasa_session_free(s); }
};
using Context = ggml_context_ptr;
using Backend = ggml_backend_ptr;
using Buffer  = ggml_backend_buffer_ptr;
using Session = std::unique_ptr<fasa_session, SessionFree>;

Backend new_backend();
void    set_threads(const Backend & backend, int n);

struct Shape {
    int32_t   head_dim  = 64;
    int32_t   n_head    = 4;
    int32_t   n_head_kv = 2;
    int64_t   n_cell    = 256; // of one stream
    int64_t   n_stream  = 1;
    ggml_type k_type    = GGML_TYPE_F16;
    ggml_type v_type    = GGML_TYPE_F16;
    float     softcap   = 0.0f;
    bool      sinks     = false;

    float       scale() const;
    std::string text() const;
};

// All chunks of every head at `bits` bits; `arrays` own what `view` points to.
struct AllChunks {
    std::vector<uint16_t> chunks;
    std::vector<uint8_t>  bits;
    fasa_profile          view;

    explicit AllChunks(const Shape & shape, uint8_t bits = 4, int32_t n_layer = 1);
};

fasa_config config_of(int32_t budget);

Session       new_session(const fasa_profile * profile, const fasa_config & config);
Backend       decorated_backend(const Session & session);
fasa_counters counters_of(const Session & session);

// One decode step: which cells get new rows, who is visible, and the numbers.
struct Step {
    std::vector<int64_t>  cells; // numbered through all streams
    std::vector<uint16_t> mask;  // f16 [n_kv, n_rows, n_stream]
    std::vector<float>    k, v;  // [head_dim * n_head_kv, cells]
    std::vector<float>    q;     // [head_dim, n_rows, n_head, n_stream]
    std::vector<float>    sinks;
    int64_t               n_rows = 1; // of each stream
};

// `cells` are written; cells below n_seen are visible, a few of them hidden.
Step random_step(std::mt19937 & rng, const Shape & shape, std::vector<int64_t> cells, int64_t n_seen);

// As many query rows per stream as n_seen has for it, each seeing that many cells; n_seen [n_rows, n_stream].
Step random_rows(std::mt19937 & rng, const Shape & shape, std::vector<int64_t> cells,
                 const std::vector<std::vector<int64_t>> & n_seen);

class Decoder {
  public:
    // Nodes that tests add to a graph, before or after the attention node. Inputs among them go by name: "shift" is
    // i32 [n_cell] position deltas, "row" an i64 [1] row number.
    using Extra = std::function<std::vector<ggml_tensor *>(ggml_context *, const Decoder &)>;

    Decoder(const Shape & shape, const Backend & backend);

    std::vector<float> run(const Step & step, const Extra & before = nullptr, const Extra & after = nullptr);

    // A tensor of the last graph by name, f32.
    const std::vector<float> & read(const std::string & name) const { return named_.at(name); }

    // From now on each graph has caches that are new tensors over the old memory, as an rpc-server makes them.
    void receive_graphs() { received_ = true; }

    // Frees the caches before the decoder goes.
    void free_cache() { buffer_.reset(); }

    const Shape & shape() const { return shape_; }
    ggml_tensor * k_cache() const { return k_; }
    ggml_tensor * v_cache() const { return v_; }

  private:
    ggml_tensor * view(ggml_context * ctx, ggml_tensor * cache, int64_t n_kv) const;
    ggml_tensor * root(ggml_context * ctx, ggml_tensor * cache) const;

    Shape          shape_;
    ggml_backend_t backend_;
    Context        ctx_;
    ggml_tensor *  k_;
    ggml_tensor *  v_;
    Buffer         buffer_;
    bool           received_ = false;

    std::map<std::string, std::vector<float>> named_; // what extra nodes computed
};

} // namespace fasa_test
