#include "plan.h"

#include <ggml-backend.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "half.h"
#include "kernels.h"

namespace fasa {

namespace {

constexpr uint16_t kHalfMinusInf = 0xfc00;

float f32_param(const ggml_tensor * node, int i) {
    float x;
    std::memcpy(&x, node->op_params + i, sizeof(x));
    return x;
}

bool on_host(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src != nullptr ? t->view_src->buffer : t->buffer;
    return t->data != nullptr && (buffer == nullptr || ggml_backend_buffer_is_host(buffer));
}

// The mask is an input: set before the graph runs, the same for all heads.
bool mask_is_readable(const ggml_tensor * mask, int64_t n_kv, int64_t n_rows) {
    return mask != nullptr && mask->type == GGML_TYPE_F16 && mask->op == GGML_OP_NONE && mask->ne[0] == n_kv &&
           mask->ne[1] >= n_rows && mask->ne[2] == 1 && mask->ne[3] == 1 && mask->nb[0] == sizeof(uint16_t) &&
           on_host(mask);
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

bool has_kernel(const ggml_tensor * t) {
    return (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_Q8_0) && t->ne[0] % 32 == 0 &&
           t->ne[0] <= FASA_MAX_HEAD_DIM && t->nb[0] == ggml_type_size(t->type);
}

} // namespace

const Visible & MaskCache::row(const ggml_tensor * mask, int64_t row) {
    const auto * p     = reinterpret_cast<const uint16_t *>(static_cast<const char *>(mask->data) + row * mask->nb[1]);
    auto &       entry = rows_[p];
    if (entry == nullptr) {
        entry           = std::make_unique<Visible>();
        const int64_t n = mask->ne[0];
        entry->words.assign((n + FASA_BLOCK_CELLS - 1) / FASA_BLOCK_CELLS, 0);
        for (int64_t b = 0; b < static_cast<int64_t>(entry->words.size()); ++b) {
            const int64_t size = std::min<int64_t>(FASA_BLOCK_CELLS, n - b * FASA_BLOCK_CELLS);
            uint64_t      word = 0;
            for (int64_t c = 0; c < size; ++c) {
                word |= static_cast<uint64_t>(p[b * FASA_BLOCK_CELLS + c] != kHalfMinusInf) << c;
            }
            entry->words[b] = word;
            entry->n_cell += __builtin_popcountll(word);
            entry->n_block = word != 0 ? b + 1 : entry->n_block;
        }
    }
    return *entry;
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

fasa_reason plan(const ggml_tensor * node, const Profile * profile, const Profile::Layouts * layouts,
                 const fasa_config & config, MaskCache & masks, Plan * out) {
    const ggml_tensor * q      = node->src[0];
    const ggml_tensor * k      = node->src[1];
    const ggml_tensor * v      = node->src[2];
    const int64_t       n_kv   = k->ne[1];
    const int64_t       n_rows = q->ne[1];
    out->k_root                = cache_root(k, &out->layer);
    out->n_head                = static_cast<int32_t>(q->ne[2]);
    out->n_head_kv             = static_cast<int32_t>(k->ne[2]);
    out->visible               = nullptr;
    out->rotation              = rotation_block(node); // of dense nodes too: keys are read after prefill

    if (config.enabled == 0 && config.capture == 0) {
        return FASA_REASON_DISABLED;
    }
    if (n_rows != 1 && config.capture == 0) {
        return FASA_REASON_PREFILL;
    }
    if (q->ne[3] != 1 || k->ne[3] != 1 || v->ne[3] != 1) {
        return FASA_REASON_STREAMS;
    }
    if (out->k_root == nullptr || v->view_src == nullptr) {
        return FASA_REASON_NO_CACHE;
    }
    if (k->view_offs % (FASA_BLOCK_CELLS * k->nb[1]) != 0) {
        return FASA_REASON_STREAMS;
    }
    if (f32_param(node, 1) != 0.0f) {
        return FASA_REASON_ALIBI;
    }
    if (node->op_params[4] != 0) {
        return FASA_REASON_N_KV_MAX;
    }
    if (!has_kernel(k) || !has_kernel(v) || q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float)) {
        return FASA_REASON_KV_TYPE;
    }
    if (!on_host(k) || !on_host(v)) {
        return FASA_REASON_KV_MEMORY;
    }
    const int32_t group = out->n_head_kv > 0 ? out->n_head / out->n_head_kv : 0;
    const bool    heads = group > 0 && group <= FASA_MAX_GROUP && out->n_head == group * out->n_head_kv &&
                          v->ne[2] == k->ne[2] && v->ne[1] >= n_kv && v->ne[0] == node->ne[0];
    if (!heads) {
        return FASA_REASON_SHAPE;
    }
    if (!mask_is_readable(node->src[3], n_kv, n_rows)) {
        return FASA_REASON_MASK;
    }
    if (config.capture != 0) {
        return FASA_REASON_CAPTURE;
    }
    if (profile == nullptr || out->layer < 0 || out->layer >= profile->n_layer || (*layouts)[out->layer].empty()) {
        return FASA_REASON_NO_PROFILE;
    }
    if (out->n_head_kv != profile->n_head_kv || k->ne[0] != profile->head_dim) {
        return FASA_REASON_SHAPE;
    }
    const Visible & visible = masks.row(node->src[3], 0);
    if (visible.n_cell < config.min_ctx || visible.n_cell == 0) {
        return FASA_REASON_SHORT_CONTEXT;
    }
    out->visible = &visible;
    return FASA_REASON_SPARSE;
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
    {"prefill", "The node has several query rows; prefill stays dense."},
    {"short_context", "Fewer cells are visible than min_ctx."},
    {"no_profile", "The profile keeps no chunk for this layer, or there is no profile."},
    {"shape", "Heads or head size of the node are not those of the profile."},
    {"alibi", "The layer adds a position bias (ALiBi); frequency chunks do not predict it."},
    {"mask", "The attention mask is missing or not readable before the graph runs."},
    {"kv_type",
     "No kernel for this type or head size of K or V; f16 and q8_0 with heads of 32 to 256 in steps of 32 exist."},
    {"kv_memory", "The KV cache is not in host memory."},
    {"no_cache", "K is not a view of a KV cache tensor."},
    {"n_kv_max", "The model was trained sparse and selects by itself."},
    {"streams", "The node serves several cache streams at once, or one that does not start on a block of cells."},
    {"no_memory", "The side index could not be allocated."},
    {"capture", "Queries are being captured; the node computes exact attention."},
};

} // namespace

const char * fasa_reason_name(int32_t reason) {
    return reason >= 0 && reason < FASA_REASON_COUNT ? kReasons[reason].name : "unknown";
}

const char * fasa_reason_text(int32_t reason) {
    return reason >= 0 && reason < FASA_REASON_COUNT ? kReasons[reason].text : "Unknown reason.";
}
