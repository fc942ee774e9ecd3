"""A copy of a llama model whose keys have outlier channels, while its attention is the same.

In each KV head a few frequency chunks of K are multiplied by factors up to 30, and the same chunks of its query heads
divided by them: q k does not change, and RoPE, which rotates inside a chunk, does not either. Real models have such
channels; an index with one step per token must not lose the others beside them.

    python docs/bench/outliers.py MODEL OUT
"""

from __future__ import annotations

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from pyfasa.identity import ModelIdentity
from pyfasa.reference import chunk_dims

CHUNKS, LEAST, MOST, SEED = 4, 5.0, 30.0, 0


def factors(model: ModelIdentity) -> np.ndarray:
    """(n_layer, n_head_kv, head_dim), 1 for channels that stay."""
    rng = np.random.default_rng(SEED)
    dims = chunk_dims(model.head_dim, model.n_rot, model.rope)
    found = np.ones((model.n_layer, model.n_head_kv, model.head_dim), np.float32)
    for layer, head in np.ndindex(found.shape[:2]):
        chunks = rng.choice(len(dims), CHUNKS, replace=False)
        sizes = np.exp(rng.uniform(np.log(LEAST), np.log(MOST), CHUNKS))
        sizes[0] = MOST
        for chunk, size in zip(chunks, sizes, strict=True):
            found[layer, head, dims[chunk]] = size
    return found


def main() -> None:
    source, target = sys.argv[1:]
    model = ModelIdentity.read(source)
    scale = factors(model)
    reader = GGUFReader(source)
    writer = GGUFWriter(target, model.architecture)
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "pyfasa.")) or name == "general.architecture":
            continue
        inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        name, _, kind = tensor.name.removesuffix(".weight").rpartition(".")
        if kind not in ("attn_q", "attn_k"):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        own = scale[int(name.split(".")[1])]
        own = (
            own.reshape(-1)
            if kind == "attn_k"
            else 1 / own.repeat(model.n_head // model.n_head_kv, 0).reshape(-1)
        )
        weights = dequantize(tensor.data, tensor.tensor_type) * own[:, None]
        writer.add_tensor(
            tensor.name, weights.astype(np.float32), raw_dtype=GGMLQuantizationType.F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
