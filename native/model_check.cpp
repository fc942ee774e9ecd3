#include "model_check.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "plan.h"

namespace fasa {

namespace {

__attribute__((format(printf, 1, 2))) std::string sentence(const char * format, ...) {
    char    text[256];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    return text;
}

// The RoPE node that the queries come from; nullptr where the trail ends earlier, as at the edge of a part of a graph.
const ggml_tensor * rope_of(const ggml_tensor * node) {
    const ggml_tensor * t = node->src[0];
    for (int steps = 0; t != nullptr && steps < 16; ++steps) {
        switch (t->op) {
            case GGML_OP_ROPE: return t;
            case GGML_OP_MUL_MAT: // the Hadamard rotation of a quantized cache; other products are not undone
                t = t->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD ? t->src[1] : nullptr;
                break;
            case GGML_OP_PERMUTE:
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_TRANSPOSE:
            case GGML_OP_CONT:
            case GGML_OP_SCALE: t = t->src[0]; break;
            default: return nullptr;
        }
    }
    return nullptr;
}

} // namespace

std::string difference(const ggml_tensor * node, int32_t layer, const fasa_model & model) {
    const auto n_head    = static_cast<int>(node->src[0]->ne[2]);
    const auto n_head_kv = static_cast<int>(node->src[1]->ne[2]);
    const auto head_dim  = static_cast<int>(node->src[1]->ne[0]);
    if (layer >= model.n_layer) {
        return sentence("the model has a layer %d, that of the profile %d layers", layer, model.n_layer);
    }
    if (head_dim != model.head_dim) {
        return sentence("heads have %d dims, those of the profile %d", head_dim, model.head_dim);
    }
    if (n_head > model.n_head || n_head_kv > model.n_head_kv) { // the profile has the largest of all layers
        return sentence("layer %d has %d heads and %d KV heads, the profile's model at most %d and %d", layer, n_head,
                        n_head_kv, model.n_head, model.n_head_kv);
    }
    const ggml_tensor * rope = rope_of(node);
    if (rope == nullptr) {
        return "";
    }
    float base = 0.0f;
    std::memcpy(&base, rope->op_params + 5, sizeof(base));
    const int n_rot = rope->op_params[1];
    const int mode  = rope->op_params[2];
    if (mode != model.rope || n_rot != model.n_rot) {
        return sentence("RoPE of type %d turns %d dims, that of the profile's model has type %d and %d dims", mode,
                        n_rot, model.rope, model.n_rot);
    }
    if (base != static_cast<float>(model.rope_freq_base)) {
        return sentence("RoPE has the base %g, that of the profile's model %g", static_cast<double>(base),
                        model.rope_freq_base);
    }
    return "";
}

std::string missing_layer(ggml_cgraph * graph, const std::vector<bool> & used) {
    std::vector<bool> seen(used.size());
    bool              logits = false;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node  = ggml_graph_node(graph, i);
        int32_t             layer = 0;
        if (node->op == GGML_OP_FLASH_ATTN_EXT && cache_root(before_cast(node->src[1]), &layer) != nullptr &&
            static_cast<size_t>(layer) < seen.size()) {
            seen[layer] = true;
        }
        logits = logits || std::strcmp(node->name, "result_output") == 0;
    }
    const auto first = static_cast<size_t>(std::find(used.begin(), used.end(), true) - used.begin());
    if (!logits || first == used.size() || !seen[first]) {
        return "";
    }
    for (size_t layer = 0; layer < used.size(); ++layer) {
        if (used[layer] && !seen[layer]) {
            return sentence("the model has no attention in layer %zu, that of the profile has", layer);
        }
    }
    return "";
}

} // namespace fasa
