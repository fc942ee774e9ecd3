"""A small decoder in PyTorch that computes what llama.cpp computes for the exported file.

Two variants: `tiny-12m` (architecture `llama`, NORM RoPE), which the repository ships, and
`tiny-12m-qknorm` (architecture `qwen3`: QK-norm, NEOX RoPE), to test a selector on a second shape.
Shapes in the docstrings: B batch, T tokens, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import RecipeError


@dataclass(frozen=True)
class Config:
    """Shape of one model. RoPE turns the whole head (n_rot = head_dim)."""

    n_layer: int = 6
    n_embd: int = 384
    n_head: int = 8
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 1024
    n_vocab: int = 4096
    rope: Literal["norm", "neox"] = "norm"
    rope_freq_base: float = 500_000.0
    qk_norm: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.n_head % self.n_head_kv:
            raise RecipeError(
                f"{self.n_head} query heads cannot share {self.n_head_kv} KV heads evenly; "
                "n_head must be a multiple of n_head_kv."
            )
        if self.head_dim % 2:
            raise RecipeError(f"head_dim is {self.head_dim}; RoPE turns pairs, so it must be even.")
        if (self.rope == "neox") != self.qk_norm:
            raise RecipeError(
                f"rope={self.rope!r} with qk_norm={self.qk_norm} has no architecture in llama.cpp "
                "here: use norm without QK-norm (llama) or neox with it (qwen3)."
            )

    @property
    def architecture(self) -> str:
        """Name of the architecture in GGUF that runs exactly this model."""
        return "qwen3" if self.qk_norm else "llama"


VARIANTS: dict[str, Config] = {
    "tiny-12m": Config(),
    "tiny-12m-qknorm": Config(
        n_head=6, head_dim=128, rope="neox", rope_freq_base=1_000_000.0, qk_norm=True
    ),
}


def rope_tables(config: Config, n_ctx: int, device: torch.device | None = None) -> Tensor:
    """Cosines and sines of all positions below `n_ctx`: float32 [2, n_ctx, 1, D / 2].

    Angles are formed in float64: at position 32768 a float32 product is off by a milliradian.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angle = torch.outer(torch.arange(n_ctx, dtype=torch.float64), config.rope_freq_base**-exponent)
    tables = torch.stack((angle.cos(), angle.sin())).float()
    return tables[:, :, None, :].to(device)


def rotate(x: Tensor, tables: Tensor, rope: str) -> Tensor:
    """Apply RoPE to [B, T, heads, D], keeping the type.

    `norm` turns the pairs (2i, 2i+1), `neox` the pairs (i, i + D/2), each by chunk i's angle.
    """
    cos, sin = tables
    if rope == "norm":
        a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    else:
        a, b = x.float().chunk(2, dim=-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    out = torch.stack(turned, -1).flatten(-2) if rope == "norm" else torch.cat(turned, -1)
    return out.to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 whatever the type of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to the stream [B, T, n_embd].

    Submodules carry GGUF's tensor names, so that export needs no table of names.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, self.config = config, config
        self.attn_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.attn_q = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=False)
        self.attn_k = nn.Linear(c.n_embd, c.n_head_kv * c.head_dim, bias=False)
        self.attn_v = nn.Linear(c.n_embd, c.n_head_kv * c.head_dim, bias=False)
        if c.qk_norm:
            self.attn_q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.attn_k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.attn_output = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.ffn_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.ffn_gate = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.ffn_up = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.ffn_down = nn.Linear(c.n_ff, c.n_embd, bias=False)

    def attend(self, x: Tensor, tables: Tensor) -> Tensor:
        """Causal grouped-query attention over [B, T, n_embd]."""
        d = self.config.head_dim
        q = self.attn_q(x).unflatten(-1, (-1, d))
        k = self.attn_k(x).unflatten(-1, (-1, d))
        v = self.attn_v(x).unflatten(-1, (-1, d))
        if self.config.qk_norm:
            q, k = self.attn_q_norm(q), self.attn_k_norm(k)
        q, k = rotate(q, tables, self.config.rope), rotate(k, tables, self.config.rope)
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        projected: Tensor = self.attn_output(out.transpose(1, 2).flatten(-2))
        return projected

    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        x = x + self.attend(self.attn_norm(x), tables)
        h = self.ffn_norm(x)
        out: Tensor = x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return out


class Model(nn.Module):
    """The decoder; the embedding is also the output matrix (tied)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.n_vocab, config.n_embd)
        self.blk = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.output_norm = RMSNorm(config.n_embd, config.norm_eps)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # Layers that write into the stream start smaller, so depth does not inflate it.
                writes = name.endswith(("attn_output.weight", "ffn_down.weight"))
                shrink = math.sqrt(2 * config.n_layer) if writes else 1.0
                nn.init.normal_(weight, std=0.02 / shrink)

    def forward(self, tokens: Tensor, tables: Tensor) -> Tensor:
        """Logits [B, T, n_vocab] of int64 `tokens` [B, T] at positions 0..T-1.

        `tables` come from `rope_tables(config, T)`.
        """
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, tables)
        return functional.linear(self.output_norm(x), self.token_embd.weight)

    def loss(
        self, tokens: Tensor, targets: Tensor, weight: Tensor, tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted mean cross-entropy in nats, and which targets were the first choice.

        `tokens`, `targets` int64 [B, T]; `weight` float [B, T]. Returns a scalar and bool [B, T].
        """
        logits = self(tokens, tables).float()
        nats = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        weight = weight.flatten()
        return (nats * weight).sum() / weight.sum(), logits.argmax(-1) == targets
