// The next token's captured graph begins before llama.cpp has filled its mask.
//
// llama.cpp sets a graph's inputs one after the other: the token first, and last the mask, cell by cell, which takes
// half a millisecond at 131,072 cells, in which the GPU has nothing to do. But all inputs of the token behind the last
// one are known once it is: the position and the cell are the next ones, the mask shows one cell more. So the graph is
// launched with these. What llama.cpp sets then is compared, and not copied again; when something differs, the launch
// is waited for, the rows of K and V that it wrote get back what they held, and the graph runs as if nothing had been.
#pragma once

#include <ggml-backend.h>

#include <memory>
#include <vector>

#include "memory.h"

namespace fasa::gpu {

// How llama.cpp makes a graph's first input on the CPU: a row of the token's.
struct Embedding {
    const void *    tokens = nullptr; // i32, of one token; nullptr: it does something else
    const uint8_t * table  = nullptr;
    int64_t         n_row = 0, row_bytes = 0, n_embd = 0;
    ggml_type       type = GGML_TYPE_F32;
    const void *    out  = nullptr; // f32 [n_embd]
};

// Of a graph on the CPU that does only that; else one without tokens.
Embedding embedding_of(ggml_cgraph * graph, ggml_backend_buffer_t * buffer);

class HeadStart {
  public:
    struct Cells { // of the cache's stream: where it begins, how many the graph sees, and how many there are
        int64_t first, n_kv, n;
    };

    // For a graph that has been captured: its inputs, and the rows of K and V that it writes. `totals`: counters on the
    // device, 32 bytes. False, and nothing will begin early, when the graph does what could not be undone.
    bool arm(ggml_cgraph * graph, const std::shared_ptr<Stream> & stream, const Cells & cells, void * totals);
    void disarm(); // when none is under way

    // The buffers of its inputs: what is set in them must come to has_input().
    const std::vector<ggml_backend_buffer_t> & buffers() const { return buffers_; }

    // The token is known: the other inputs are foretold. True when the last tokens' were foretold rightly, so that the
    // launch may come behind begin().
    bool foretell(const Embedding & embedding);
    bool begin(); // inputs go to where the graph reads them, and what it overwrites is kept
    bool is_under_way() const { return under_way_; }
    void end() { under_way_ = false; } // it was right

    enum class Input {
        unknown, // not of this graph
        differs, // from what the launch that is under way was told
        copy,    // as usual
        there    // it need not be copied
    };
    Input input(const ggml_tensor * t, const void * data, size_t offset, size_t size);

    // All inputs are set. True when a launch is under way that got these.
    bool arrive();

    // Waits for the launch that is under way, puts back what it overwrote, and copies the inputs that were not copied.
    bool    undo();
    int64_t cell() const { return cell_; } // from first_cell, of the last launch

  private:
    enum class Role { same, next_32, next_64, mask, embedding };
    struct Given {
        const ggml_tensor * tensor;
        uint8_t *           data;
        int64_t             bytes, at; // where it is in told_ and masks_
        int32_t             bytes_per_cell;
        Role                role;
        bool                is_known = false; // told_ has what llama.cpp set last, or what is foretold
        bool                is_set   = false; // since the token
    };

    bool find(ggml_cgraph * graph);
    bool add_write(const ggml_tensor * node);
    void add_input(const ggml_tensor * t, Role role);
    bool list_transfers(void * totals);
    void forget();

    std::shared_ptr<Stream>            stream_;
    std::vector<Given>                 given_;
    std::vector<ggml_backend_buffer_t> buffers_;
    std::vector<Transfer>              rows_; // that the graph overwrites; `to` is empty
    int64_t                            first_cell_ = 0, n_kv_ = 0, n_cell_ = 0, cell_ = -1;
    Pinned                             told_; // inputs as foretold
    Memory<uint8_t>                    masks_, kept_;
    Memory<Transfer>                   transfers_; // what is kept, then inputs
    const void *                       embedded_ = nullptr;
    bool                               is_armed_ = false, is_foretold_ = false, is_right_ = false;
    bool                               under_way_ = false, has_begun_ = false; // the last token; whether early
    bool                               continues_ = false;                     // the one before it began early
    int32_t                            n_right_ = 0, n_needed_ = 0;            // tokens in a row that were foretold
};

} // namespace fasa::gpu
