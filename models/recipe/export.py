"""GGUF on both sides of the recipe: write a trained model for llama.cpp, read one back.

Rows of attn_q and attn_k stay as they are. Converters of Hugging Face checkpoints permute them,
since those models turn split halves; this model turns llama.cpp's own pairs already.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from . import RecipeError
from .checkpoint import Checkpoint
from .model import Config, Model
from .text import TOKENIZER

WEIGHT_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def export(
    model: Model,
    path: Path,
    *,
    name: str,
    n_ctx: int,
    weight_type: str = "q8_0",
    tokenizer: Path = TOKENIZER,
    force: bool = False,
) -> None:
    """Write `model` as one GGUF file, beside the target first and then moved into its place.

    `n_ctx` is the longest context trained on, in tokens. Norms stay F32. Raises RecipeError for an
    unknown type or a width that the type cannot hold, FileExistsError unless `force`.
    """
    if weight_type not in WEIGHT_TYPES:
        known = ", ".join(WEIGHT_TYPES)
        raise RecipeError(f"weight type {weight_type!r} is not known; choose one of {known}.")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already; name another file or pass --force.")
    c = model.config
    block = gguf.GGML_QUANT_SIZES[WEIGHT_TYPES[weight_type]][0]
    for what, width in (("n_embd", c.n_embd), ("n_ff", c.n_ff), ("heads", c.n_head * c.head_dim)):
        if width % block:
            raise RecipeError(
                f"{weight_type} stores rows in blocks of {block}, and the width {width} of {what} "
                "is no multiple of it; export as f16 instead."
            )
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    writer = gguf.GGUFWriter(partial, c.architecture)
    try:
        _add_shape(writer, c, name, n_ctx)
        _add_tokenizer(writer, tokenizer, c.n_vocab)
        for tensor_name, weight in model.state_dict().items():
            _add_tensor(writer, tensor_name, weight, weight_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _add_shape(writer: gguf.GGUFWriter, c: Config, name: str, n_ctx: int) -> None:
    writer.add_name(name)
    writer.add_context_length(n_ctx)
    writer.add_block_count(c.n_layer)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_head_kv)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_freq_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.n_vocab)


def _add_tokenizer(writer: gguf.GGUFWriter, path: Path, n_vocab: int) -> None:
    """Byte-level BPE for llama.cpp; pre-tokenizer `smollm` = single digits, then GPT-2's split."""
    spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vocab: dict[str, int] = spec["model"]["vocab"]
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens = sorted({**vocab, **special}.items(), key=lambda item: item[1])
    if [token_id for _, token_id in tokens] != list(range(n_vocab)):
        raise RecipeError(
            f"{path} has {len(tokens)} tokens and the model {n_vocab}; use the tokenizer that the "
            "model was trained with."
        )
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([control if token in special else normal for token, _ in tokens])
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_bos_token_id(special["<|endoftext|>"])
    writer.add_eos_token_id(special["<|im_end|>"])
    writer.add_pad_token_id(special["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, weight_type: str) -> None:
    values: npt.NDArray[np.float32] = weight.detach().float().cpu().numpy()
    kind = WEIGHT_TYPES[weight_type if values.ndim > 1 else "f32"]
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def read_gguf(path: Path) -> Model:
    """The model in a GGUF file of either variant, its weights dequantized to float32."""
    reader = gguf.GGUFReader(path)
    architecture = str(_value(reader, "general.architecture"))
    if architecture not in ("llama", "qwen3"):
        raise RecipeError(
            f"{path} is of architecture {architecture}; the recipe knows llama and qwen3."
        )
    shape = {
        field: _value(reader, f"{architecture}.{key}")
        for field, key in {
            "n_layer": "block_count",
            "n_embd": "embedding_length",
            "n_head": "attention.head_count",
            "n_head_kv": "attention.head_count_kv",
            "head_dim": "attention.key_length",
            "n_ff": "feed_forward_length",
            "rope_freq_base": "rope.freq_base",
            "norm_eps": "attention.layer_norm_rms_epsilon",
        }.items()
    }
    qk_norm = architecture == "qwen3"
    config = Config(
        **shape,
        n_vocab=len(_value(reader, "tokenizer.ggml.tokens")),
        rope="neox" if qk_norm else "norm",
        qk_norm=qk_norm,
    )
    model = Model(config)
    model.load_state_dict(
        {
            tensor.name: torch.from_numpy(
                np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            )
            for tensor in reader.tensors
        }
    )
    return model.eval()


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise RecipeError(f"the file has no key {key}; is it a model of this recipe?")
    return field.contents()


def main(arguments: list[str] | None = None) -> int:
    """Command line: `python -m models.recipe.export CHECKPOINT OUT.gguf`."""
    parser = argparse.ArgumentParser(
        prog="python -m models.recipe.export", description="Write a checkpoint as GGUF."
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a training run")
    parser.add_argument("out", type=Path, help="GGUF file to write")
    parser.add_argument("--type", default="q8_0", choices=WEIGHT_TYPES, help="type of the weights")
    parser.add_argument("--name", help="general.name; default: the variant's")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args(arguments)
    try:
        saved = Checkpoint.load(args.checkpoint)
        model = Model(saved.config)
        model.load_state_dict(saved.model)
        export(
            model,
            args.out,
            name=args.name or f"pyfasa-{saved.variant}",
            n_ctx=saved.longest_context,
            weight_type=args.type,
            force=args.force,
        )
    except (OSError, RecipeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
