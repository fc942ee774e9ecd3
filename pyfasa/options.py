"""Options that several commands share, and how lists of them are read."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class KvType(str, Enum):  # as in native.KV_TYPES, which takes a second to import
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"
    q4_1 = "q4_1"
    q5_0 = "q5_0"
    q5_1 = "q5_1"
    iq4_nl = "iq4_nl"


class BenchOutput(str, Enum):
    md = "md"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Table(str, Enum):
    md = "md"
    json = "json"


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF model.")]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="Profile to use instead of the model's own.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="OUT.png", help="Also draw a plot (PNG).")
]
TypeK = Annotated[KvType, typer.Option("-ctk", "--cache-type-k", help="Type of the K cache.")]
TypeV = Annotated[KvType, typer.Option("-ctv", "--cache-type-v", help="Type of the V cache.")]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", min=1, help="Threads; default: all CPUs.")
]
Chunks = Annotated[
    int | None, typer.Option("--n-fc", min=1, help="Frequency chunks to score with.")
]
MinCtx = Annotated[
    int | None, typer.Option("--min-ctx", min=0, help="Stay dense below this many tokens.")
]
IndexBits = Annotated[
    int | None, typer.Option("--index-bits", help="1, 2, 4 or 8 bits per scored dim.")
]
Documents = Annotated[
    list[Path] | None, typer.Option("-f", "--file", help="Document to put first; repeatable.")
]
Temperature = Annotated[float, typer.Option("--temp", min=0.0, help="0: the likeliest token.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def numbers(text: str) -> tuple[int, ...]:
    """`1024,8192` -> (1024, 8192)"""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1024,8192") from None


def decimals(text: str) -> tuple[float, ...]:
    """`6,10.5` -> (6.0, 10.5)"""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 6,10.5") from None


def words(text: str) -> tuple[str, ...]:
    """`dense,fasa` -> ("dense", "fasa")"""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def kv_types(text: str) -> tuple[str, ...]:
    """`f16,q8_0` -> ("f16", "q8_0"); `all` -> every type."""
    names = [kind.value for kind in KvType]
    found = names if text == "all" else text.split(",")
    if unknown := set(found) - set(names):
        raise typer.BadParameter(
            f"{', '.join(unknown)} is no K/V type; give {', '.join(names)}, or all"
        )
    return tuple(found)
