#include "plan.h"

#include <ggml-backend.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "half.h"
#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fasa {

namespace {

float f32_param(const ggml_tensor * node, int i) {
    float x;
    std::memcpy(&x, node->op_params + i, sizeof(x));
    return x;
}

// llama.cpp multiplies q and k by a Hadamard matrix when K is quantized; the block is that matrix's side. It is found
// by following q to the multiplication. Where another backend computed q the trail ends, and llama.cpp's own rule
// (llama-kv-cache.cpp, attn_rot_k) decides.
int32_t rotation_block(const ggml_tensor * node) {
    const ggml_tensor * t = node->src[0];
    while (t->op == GGML_OP_PERMUTE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE ||
           t->op == GGML_OP_TRANSPOSE || t->op == GGML_OP_CONT) {
        t = t->src[0];
    }
    if (t->op == GGML_OP_MUL_MAT && t->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD) {
        return static_cast<int32_t>(t->src[0]->ne[0]);
    }
    const int64_t head_dim = node->src[1]->ne[0];
    const char *  disabled = std::getenv("LLAMA_ATTN_ROT_DISABLE");
    if (t->op != GGML_OP_NONE || !ggml_is_quantized(node->src[1]->type) || head_dim % 64 != 0 ||
        (disabled != nullptr && std::strtol(disabled, nullptr, 10) != 0)) {
        return 0;
    }
    int32_t block = 64;
    while (head_dim % (2 * block) == 0) {
        block *= 2;
    }
    return block;
}

bool has_kernel(const ggml_tensor * t, bool device) {
    const bool on_device =
        t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 || t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0;
    return (on_device || !device) && kv_type(t->type) != nullptr && t->ne[0] % kKvBlock == 0 &&
           t->ne[0] <= FASA_MAX_HEAD_DIM && t->nb[0] == ggml_type_size(t->type);
}

// Where the view begins in the cache, as a whole stream; -1 when it does not, or does not go on as the cache does.
int64_t first_stream(const ggml_tensor * k, const ggml_tensor * root) {
    const auto    stream_bytes = static_cast<size_t>(root->ne[1]) * root->nb[1];
    const bool    whole        = stream_bytes > 0 && k->view_offs % stream_bytes == 0 && k->nb[1] == root->nb[1] &&
                                 k->ne[1] <= root->ne[1] && (k->ne[3] == 1 || k->nb[3] == root->nb[2]);
    const int64_t first        = whole ? static_cast<int64_t>(k->view_offs / stream_bytes) : -1;
    return first + k->ne[3] <= root->ne[2] ? first : -1;
}

// Bit c: cell c of up to 64 is visible. Where every layer is a graph of its own, as with weights on a GPU and the cache
// in system memory, masks are read once per layer.
uint64_t visible_word(const uint16_t * mask, int64_t size) {
    uint64_t word = 0;
    int64_t  c    = 0;
#if defined(__SSE2__)
    const __m128i hidden = _mm_set1_epi16(static_cast<int16_t>(kHalfMinusInf));
    for (; c + 16 <= size; c += 16) {
        const __m128i a    = _mm_loadu_si128(reinterpret_cast<const __m128i *>(mask + c));
        const __m128i b    = _mm_loadu_si128(reinterpret_cast<const __m128i *>(mask + c + 8));
        const __m128i both = _mm_packs_epi16(_mm_cmpeq_epi16(a, hidden), _mm_cmpeq_epi16(b, hidden));
        word |= static_cast<uint64_t>(~_mm_movemask_epi8(both) & 0xffff) << c;
    }
#endif
    for (; c < size; ++c) {
        word |= static_cast<uint64_t>(mask[c] != kHalfMinusInf) << c;
    }
    return word;
}

bool mask_fits(const ggml_tensor * node) {
    const ggml_tensor * q    = node->src[0];
    const ggml_tensor * mask = node->src[3];
    return mask != nullptr && mask->type == GGML_TYPE_F16 && mask->ne[0] == node->src[1]->ne[1] &&
           mask->ne[1] >= q->ne[1] && mask->ne[2] == 1 && mask->ne[3] == q->ne[3] && mask->nb[0] == sizeof(uint16_t);
}

} // namespace

bool mask_is_input(const ggml_tensor * node) {
    return mask_fits(node) && node->src[3]->op == GGML_OP_NONE && node->src[3]->data != nullptr;
}

bool on_host(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src != nullptr ? t->view_src->buffer : t->buffer;
    return t->data != nullptr && (buffer == nullptr || ggml_backend_buffer_is_host(buffer));
}

bool selects_by_itself(const ggml_tensor * node) { return node->op_params[4] != 0; }

Visible & MaskCache::read(const ggml_tensor * mask, int64_t stream, int64_t row) {
    const char * at    = static_cast<const char *>(mask->data) + stream * mask->nb[3] + row * mask->nb[1];
    const auto * p     = reinterpret_cast<const uint16_t *>(at);
    auto &       entry = rows_[p];
    if (entry == nullptr) {
        entry           = std::make_unique<Visible>();
        const int64_t n = mask->ne[0];
        entry->words.assign((n + FASA_BLOCK_CELLS - 1) / FASA_BLOCK_CELLS, 0);
        for (int64_t b = 0; b < static_cast<int64_t>(entry->words.size()); ++b) {
            const int64_t  first = b * FASA_BLOCK_CELLS;
            const uint64_t word  = visible_word(p + first, std::min<int64_t>(FASA_BLOCK_CELLS, n - first));
            entry->words[b]      = word;
            entry->n_cell += __builtin_popcountll(word);
            entry->n_block = word != 0 ? b + 1 : entry->n_block;
        }
    }
    return *entry;
}

const Visible & MaskCache::row(const ggml_tensor * mask, int64_t stream, int64_t row, const fasa_config & config,
                               const WriteOrder & order, int64_t cache_stream) {
    Visible & v = read(mask, stream, row);
    if (v.forced.empty()) {
        order.first(cache_stream, config.sinks, v.words, &v.forced);
        order.last(cache_stream, config.recent, v.words, &v.forced);
    }
    return v;
}

bool is_view_op(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

bool is_computed(const ggml_tensor * node) {
    return (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && !is_view_op(node);
}

const ggml_tensor * before_cast(const ggml_tensor * t) {
    return t->op == GGML_OP_CPY && t->src[0]->type == GGML_TYPE_F32 ? t->src[0] : t;
}

ggml_tensor * cache_root(const ggml_tensor * view, int32_t * layer) {
    static const char prefix[] = "cache_k_l";
    ggml_tensor *     root     = view->view_src;
    if (root == nullptr || std::strncmp(root->name, prefix, sizeof(prefix) - 1) != 0) {
        return nullptr;
    }
    const char * digits = root->name + sizeof(prefix) - 1;
    char *       end    = nullptr;
    const long   number = std::strtol(digits, &end, 10);
    if (end == digits || *end != '\0' || number < 0 || number > INT16_MAX) { // names of others may begin like it
        return nullptr;
    }
    *layer = static_cast<int32_t>(number);
    return root;
}

// Measured on an H200: f16 begins to pay at 5 to 6 budgets with groups of four and at 8 with groups of eight, q8_0,
// which dense attention converts first, at less than 4 with either.
int32_t pays_from_cuda(int32_t k_type, int32_t group) {
    constexpr int32_t kLeast = 4;
    const bool        half   = k_type == GGML_TYPE_F16 || k_type == GGML_TYPE_BF16;
    return half ? kLeast + group / 2 : kLeast;
}

fasa_reason plan(const ggml_tensor * node, const PlanContext & context, bool sliding, Plan * out) {
    const ggml_tensor * q        = node->src[0];
    const ggml_tensor * k        = before_cast(node->src[1]);
    const ggml_tensor * v        = before_cast(node->src[2]);
    const fasa_config & config   = *context.config;
    const Profile *     profile  = context.profile;
    const int64_t       n_kv     = k->ne[1];
    const int64_t       n_rows   = q->ne[1];
    const int64_t       n_stream = q->ne[3];
    out->k                       = k;
    out->v                       = v;
    out->k_root                  = cache_root(k, &out->layer);
    out->n_head                  = static_cast<int32_t>(q->ne[2]);
    out->n_head_kv               = static_cast<int32_t>(k->ne[2]);
    out->rotation                = rotation_block(node); // of dense nodes too: keys are read after prefill

    if (config.enabled == 0 && config.capture == 0) {
        return FASA_REASON_DISABLED;
    }
    if (n_rows > config.max_rows && config.capture == 0) {
        return FASA_REASON_PREFILL;
    }
    if (out->k_root == nullptr || v->view_src == nullptr) {
        return FASA_REASON_NO_CACHE;
    }
    out->first_stream = first_stream(k, out->k_root);
    if (out->first_stream < 0 || k->ne[3] != n_stream || v->ne[3] != n_stream ||
        (n_stream != 1 && config.capture != 0)) {
        return FASA_REASON_STREAMS;
    }
    if (f32_param(node, 1) != 0.0f) {
        return FASA_REASON_ALIBI;
    }
    if (selects_by_itself(node)) {
        return FASA_REASON_N_KV_MAX;
    }
    if (!has_kernel(k, context.device) || !has_kernel(v, context.device) || q->type != GGML_TYPE_F32 ||
        q->nb[0] != sizeof(float)) {
        return FASA_REASON_KV_TYPE;
    }
    if (on_host(k) == context.device || on_host(v) == context.device || (context.device && config.capture != 0)) {
        return FASA_REASON_KV_MEMORY;
    }
    if (context.order == nullptr && !context.device) {
        return FASA_REASON_NO_CACHE;
    }
    const int32_t group = out->n_head_kv > 0 ? out->n_head / out->n_head_kv : 0;
    const bool    heads = group > 0 && group <= FASA_MAX_GROUP && out->n_head == group * out->n_head_kv &&
                          v->ne[2] == k->ne[2] && v->ne[1] >= n_kv && v->ne[0] == node->ne[0];
    if (!heads) {
        return FASA_REASON_SHAPE;
    }
    if (context.device ? !mask_fits(node) : !mask_is_input(node) || !on_host(node->src[3])) {
        return FASA_REASON_MASK;
    }
    if (sliding) {
        return FASA_REASON_SWA;
    }
    if (config.capture != 0) {
        return FASA_REASON_CAPTURE;
    }
    if (profile == nullptr || out->layer < 0 || out->layer >= profile->n_layer ||
        (*context.layouts)[out->layer].empty()) {
        return FASA_REASON_NO_PROFILE;
    }
    if (out->n_head_kv > profile->n_head_kv || k->ne[0] != profile->head_dim) {
        return FASA_REASON_SHAPE;
    }
    const int64_t at_least = std::max(config.min_ctx, 1);
    if (context.device) { // how many cells a row sees is the kernels' to find; they attend all when too few
        return n_kv < at_least ? FASA_REASON_SHORT_CONTEXT : FASA_REASON_SPARSE;
    }
    bool sparse = false;
    for (int64_t stream = 0; stream < n_stream; ++stream) {
        out->n_block.push_back(0);
        for (int64_t row = 0; row < n_rows; ++row) {
            const Visible & visible =
                context.masks->row(node->src[3], stream, row, config, *context.order, out->first_stream + stream);
            const bool attend_all = visible.n_cell < at_least;
            out->rows.push_back({stream, row, &visible, attend_all});
            if (!attend_all) {
                sparse              = true;
                out->n_block.back() = std::max(out->n_block.back(), visible.n_block);
            }
        }
    }
    return sparse ? FASA_REASON_SPARSE : FASA_REASON_SHORT_CONTEXT;
}

} // namespace fasa

namespace {

struct ReasonWords {
    const char * name;
    const char * text;
};

const ReasonWords kReasons[FASA_REASON_COUNT] = {
    {"sparse", "Replaced by score, select and attend."},
    {"disabled", "FASA is switched off for this context."},
    {"prefill", "The node has more query rows than max_rows; prefill stays dense."},
    {"short_context", "Fewer cells are visible than min_ctx."},
    {"no_profile",
     "The profile keeps no chunk for this layer, or none that this device has a kernel for, or there is no profile."},
    {"shape", "Heads or head size of the node, or the model's layers or RoPE, are not those of the profile."},
    {"alibi", "The layer adds a position bias (ALiBi); frequency chunks do not predict it."},
    {"mask", "The attention mask is missing or not readable before the graph runs."},
    {"kv_type", "No kernel for this type or head size of K or V; heads of 32 to 256 in steps of 32 exist."},
    {"kv_memory",
     "The KV cache is in memory that no kernel of this backend reads, or queries are captured from a GPU."},
    {"no_cache", "K is not a view of a KV cache tensor."},
    {"n_kv_max", "The model was trained sparse and selects by itself."},
    {"streams", "The node's view of the cache does not begin with a stream, or several are captured at once."},
    {"no_memory", "The side index could not be allocated."},
    {"capture", "Queries are being captured; the node computes exact attention."},
    {"swa", "The layer attends to a sliding window, or it is not yet known which layers do."},
    {"cache_views", "Another node of the graph views the same cache in another shape."},
};

} // namespace

const char * fasa_reason_name(int32_t reason) {
    return reason >= 0 && reason < FASA_REASON_COUNT ? kReasons[reason].name : "unknown";
}

const char * fasa_reason_text(int32_t reason) {
    return reason >= 0 && reason < FASA_REASON_COUNT ? kReasons[reason].text : "Unknown reason.";
}
