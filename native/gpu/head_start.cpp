#include "head_start.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "../plan.h"

namespace fasa::gpu {

namespace {

constexpr int64_t kAlign     = 16;
constexpr int64_t kMaskBytes = 4; // of a cell, at most
// Tokens in a row that must have been foretold before a launch: behind a wrong one twice as many as before it, unless
// many were right between.
constexpr int32_t kFewest = 2, kMost = 32, kMany = 16;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

const ggml_tensor * root_of(const ggml_tensor * t) { return t->view_src != nullptr ? t->view_src : t; }

bool is_scratch(const ggml_tensor * root) {
    return root->buffer != nullptr && ggml_backend_buffer_get_usage(root->buffer) == GGML_BACKEND_BUFFER_USAGE_COMPUTE;
}

template <typename T> T increase(uint8_t * at) {
    T x;
    std::memcpy(&x, at, sizeof(T));
    ++x;
    std::memcpy(at, &x, sizeof(T));
    return x;
}

// The token's row, as ggml's GET_ROWS makes it.
bool embed(const Embedding & e, int64_t bytes, uint8_t * out) {
    int32_t token;
    std::memcpy(&token, e.tokens, sizeof(token));
    if (token < 0 || token >= e.n_row || e.n_embd * static_cast<int64_t>(sizeof(float)) != bytes) {
        return false;
    }
    const uint8_t * row = e.table + token * e.row_bytes;
    if (e.type == GGML_TYPE_F32) {
        std::memcpy(out, row, static_cast<size_t>(bytes));
    } else {
        ggml_get_type_traits(e.type)->to_float(row, reinterpret_cast<float *>(out), e.n_embd);
    }
    return true;
}

} // namespace

Embedding embedding_of(ggml_cgraph * graph, ggml_backend_buffer_t * buffer) {
    const ggml_tensor * only = nullptr;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (is_computed(node)) {
            if (only != nullptr || node->op != GGML_OP_GET_ROWS) {
                return {};
            }
            only = node;
        }
    }
    if (only == nullptr) {
        return {};
    }
    const ggml_tensor *table = only->src[0], *tokens = only->src[1];
    const bool fits = tokens->type == GGML_TYPE_I32 && tokens->op == GGML_OP_NONE && ggml_nelements(tokens) == 1 &&
                      tokens->buffer != nullptr && only->type == GGML_TYPE_F32 && table->op == GGML_OP_NONE &&
                      ggml_n_dims(table) <= 2 && table->buffer != nullptr &&
                      ggml_backend_buffer_is_host(table->buffer) &&
                      (table->type == GGML_TYPE_F32 || ggml_get_type_traits(table->type)->to_float != nullptr);
    if (!fits) {
        return {};
    }
    *buffer = tokens->buffer;
    return {tokens->data, static_cast<const uint8_t *>(table->data),
            table->ne[1], static_cast<int64_t>(table->nb[1]),
            table->ne[0], table->type,
            only->data};
}

// ---- what a graph is given, and what it writes ---------------------------------------------------------------------

bool HeadStart::arm(ggml_cgraph * graph, const std::shared_ptr<Stream> & stream, const Cells & cells, void * totals) {
    disarm();
    stream_ = stream, first_cell_ = cells.first, n_kv_ = cells.n_kv, n_cell_ = cells.n;
    n_right_ = 0, n_needed_ = kFewest;
    try {
        is_armed_ = find(graph) && list_transfers(totals);
    } catch (const std::bad_alloc &) {
        is_armed_ = false; // tokens begin when they would have
    }
    if (!is_armed_) {
        disarm();
    }
    return is_armed_;
}

void HeadStart::disarm() {
    is_armed_ = is_foretold_ = has_begun_ = false;
    given_.clear();
    buffers_.clear();
    rows_.clear();
}

void HeadStart::add_input(const ggml_tensor * t, Role role) {
    const auto known = std::find_if(given_.begin(), given_.end(), [t](const Given & g) { return g.tensor == t; });
    if (known != given_.end()) {
        known->role = known->role == Role::same ? role : known->role;
        return;
    }
    const int64_t at = given_.empty() ? 0 : given_.back().at + aligned(given_.back().bytes);
    given_.push_back({t, static_cast<uint8_t *>(t->data), static_cast<int64_t>(ggml_nbytes(t)), at,
                      static_cast<int32_t>(ggml_element_size(t)), role});
    if (std::find(buffers_.begin(), buffers_.end(), t->buffer) == buffers_.end()) {
        buffers_.push_back(t->buffer);
    }
}

// What lies beyond the scheduler's own memory outlives the graph: only rows of a cache may be written there.
bool HeadStart::add_write(const ggml_tensor * node) {
    const ggml_tensor * rows = node->op == GGML_OP_SET_ROWS ? node->src[1] : nullptr;
    if (rows == nullptr || rows->type != GGML_TYPE_I64 || ggml_nelements(rows) != 1 || node->ne[2] != 1 ||
        node->ne[3] != 1 || node->ne[1] < first_cell_ + n_kv_) {
        return false;
    }
    const auto    step  = static_cast<int64_t>(node->nb[1]);
    const int64_t bytes = static_cast<int64_t>(ggml_row_size(node->type, node->ne[0]));
    rows_.push_back({static_cast<uint8_t *>(node->data) + first_cell_ * step, nullptr, bytes, step, 0, 0});
    return true;
}

bool HeadStart::find(ggml_cgraph * graph) {
    std::unordered_set<const ggml_tensor *> made;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (!is_computed(node)) {
            continue;
        }
        for (int s = 0; s < GGML_MAX_SRC && node->src[s] != nullptr; ++s) {
            const ggml_tensor * src  = node->src[s];
            const ggml_tensor * root = root_of(src);
            if (made.count(src) != 0 || made.count(root) != 0 || !is_scratch(root)) {
                continue;
            }
            const bool one  = ggml_nelements(root) == 1;
            const bool mask = node->op == GGML_OP_FLASH_ATTN_EXT && s == 3 && ggml_nelements(root) == n_kv_;
            add_input(root, mask                                            ? Role::mask
                            : node->op == GGML_OP_SET_ROWS && s == 1 && one ? Role::next_64
                            : node->op == GGML_OP_ROPE && s == 1 && one     ? Role::next_32
                                                                            : Role::same);
        }
        made.insert(node);
        if (!is_scratch(root_of(node)) && !add_write(node)) {
            return false;
        }
    }
    return !given_.empty() && !rows_.empty();
}

// Pieces that are kept, and then inputs.
bool HeadStart::list_transfers(void * totals) {
    const Api * api  = stream_->api();
    int64_t     kept = 0;
    rows_.push_back({static_cast<uint8_t *>(totals), nullptr, 4 * sizeof(int64_t), 0, 0, 0});
    for (Transfer & row : rows_) {
        kept += aligned(row.bytes);
    }
    // Masks grow with n_kv: room for the whole cache, so that nothing moves.
    const int64_t n_mask =
        std::count_if(given_.begin(), given_.end(), [](const Given & g) { return g.role == Role::mask; });
    const int64_t bytes = given_.back().at + aligned(given_.back().bytes) + n_mask * (n_cell_ - n_kv_) * kMaskBytes;
    told_.reserve(stream_, bytes);
    masks_.reserve(stream_, bytes);
    kept_.reserve(stream_, kept);
    transfers_.reserve(stream_, static_cast<int64_t>(rows_.size() + given_.size()));
    std::vector<Transfer> all  = rows_;
    uint8_t *             next = kept_.get();
    for (Transfer & row : all) {
        row.to = next;
        next += aligned(row.bytes);
    }
    for (const Given & g : given_) {
        const bool mask = g.role == Role::mask;
        all.push_back({(mask ? masks_.get() : told_.get()) + g.at, g.data, g.bytes, 0, 0, mask ? g.bytes_per_cell : 0});
    }
    return api->upload(stream_->device(), transfers_.get(), all.data(), all.size() * sizeof(Transfer)) == 0;
}

// ---- a token -------------------------------------------------------------------------------------------------------

bool HeadStart::foretell(const Embedding & embedding) {
    is_foretold_ = is_armed_ && stream_->api()->is_idle(stream_->device()); // else told_ may still be read
    if (!is_foretold_) {
        forget();
        return false;
    }
    continues_    = has_begun_;
    has_begun_    = false;
    is_right_     = true;
    embedded_     = embedding.out;
    cell_         = -1;
    bool is_known = true;
    for (Given & g : given_) {
        uint8_t * at = told_.get() + g.at;
        g.is_set     = false;
        is_known     = is_known && g.is_known;
        if (g.role == Role::next_32) {
            increase<int32_t>(at);
        } else if (g.role == Role::next_64) { // K's and V's rows are the same
            const int64_t cell = increase<int64_t>(at) - first_cell_;
            is_known           = is_known && (cell_ < 0 || cell_ == cell);
            cell_              = cell;
        } else if (g.role == Role::embedding) {
            is_known = embed(embedding, g.bytes, at) && is_known;
        }
    }
    if (cell_ < 0 || cell_ >= n_kv_) {
        return false;
    }
    for (Given & g : given_) {
        if (g.role == Role::mask) { // one cell more is to be seen
            std::memset(told_.get() + g.at + cell_ * g.bytes_per_cell, 0, static_cast<size_t>(g.bytes_per_cell));
        }
    }
    return is_known && n_right_ >= n_needed_;
}

void HeadStart::forget() {
    for (Given & g : given_) {
        g.is_known = false;
    }
}

bool HeadStart::begin() {
    const Api * api    = stream_->api();
    Device *    device = stream_->device();
    bool        ok     = true;
    for (const Given & g : given_) {
        if (g.role == Role::mask && !continues_) { // else only a cell is new, which the copy adds
            ok = ok && api->upload(device, masks_.get() + g.at, told_.get() + g.at, static_cast<size_t>(g.bytes)) == 0;
        }
    }
    has_begun_ = under_way_ = ok && api->transfer(device, transfers_.get(),
                                                  static_cast<int32_t>(rows_.size() + given_.size()), cell_, 0) == 0;
    return under_way_;
}

HeadStart::Input HeadStart::input(const ggml_tensor * t, const void * data, size_t offset, size_t size) {
    const auto at = std::find_if(given_.begin(), given_.end(), [t](const Given & g) { return g.tensor == t; });
    if (at == given_.end()) {
        return Input::unknown;
    }
    if (!is_foretold_ || offset != 0 || static_cast<int64_t>(size) != at->bytes) {
        at->is_known = false;
        return under_way_ ? Input::differs : Input::copy;
    }
    if (data == embedded_ && at->role == Role::same) {
        at->role = Role::embedding;
    }
    uint8_t *  told = told_.get() + at->at;
    const bool same = at->is_known && std::memcmp(told, data, size) == 0;
    if (same) {
        at->is_set = true;
        return under_way_ ? Input::there : Input::copy;
    }
    is_right_ = false;
    if (under_way_) {
        return Input::differs; // told_ may still be read
    }
    std::memcpy(told, data, size);
    at->is_set = at->is_known = true;
    return Input::copy;
}

bool HeadStart::arrive() {
    const bool all =
        is_foretold_ && std::all_of(given_.begin(), given_.end(), [](const Given & g) { return g.is_set; });
    n_right_     = all && is_right_ ? n_right_ + 1 : 0;
    is_foretold_ = false;
    return all && under_way_;
}

bool HeadStart::undo() {
    const Api * api    = stream_->api();
    Device *    device = stream_->device();
    bool        ok     = api->wait(device) == 0 &&
                         api->transfer(device, transfers_.get(), static_cast<int32_t>(rows_.size()), cell_, 1) == 0;
    for (Given & g : given_) {
        if (g.is_set) {
            ok = ok && api->upload(device, g.data, told_.get() + g.at, static_cast<size_t>(g.bytes)) == 0;
        }
    }
    n_needed_  = n_right_ < kMany ? std::min(2 * n_needed_, kMost) : kFewest;
    n_right_   = 0;
    under_way_ = false;
    return ok && api->wait(device) == 0;
}

} // namespace fasa::gpu
