// Whether a graph is of the model that a profile belongs to, as far as a graph shows: layers, heads, RoPE. The plugin
// knows the model by nothing else; pyfasa.Llama has read the model file.
#pragma once

#include <ggml.h>

#include <string>
#include <vector>

#include "fasa.h"

namespace fasa {

// A sentence about the first difference, naming both values; empty when there is none. `node` attends to a layer.
std::string difference(const ggml_tensor * node, int32_t layer, const fasa_model & model);

// A graph from the first layer to the logits has attention in every layer that the profile has chunks for.
// used: by layer; the caches' layers are read from the graph. A part of a model's graph is no evidence: empty.
std::string missing_layer(ggml_cgraph * graph, const std::vector<bool> & used);

} // namespace fasa
