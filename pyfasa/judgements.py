"""What the facts about a machine and a model mean, and what to do: pure functions to findings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pyfasa.console import human_bytes, percent
from pyfasa.flash_attention import Pair, Service
from pyfasa.footprint import Footprint
from pyfasa.machine import Device, rebuild

Status = Literal["ok", "note", "problem"]

NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"

# llama.cpp's feature -> the CPU flag it needs; the order is that of the report
FEATURES = {
    "AVX": "avx",
    "AVX2": "avx2",
    "F16C": "f16c",
    "FMA": "fma",
    "BMI2": "bmi2",
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. "problem": FASA cannot work; "note": it could work better."""

    topic: str
    value: str
    status: Status = "ok"
    remedy: str = ""


def judge_instructions(flags: frozenset[str], built: frozenset[str], _: str = "") -> Finding:
    """What the CPU has against what llama.cpp was built with."""
    has = [name for name, flag in FEATURES.items() if flag in flags]
    uses = [name for name in FEATURES if name in built]
    value = f"llama.cpp uses {' '.join(uses) or 'none'}"
    if not flags:
        return Finding("instruction sets", value)
    lacks = [name for name in uses if name not in has]
    if lacks:
        return Finding(
            "instruction sets",
            f"llama.cpp was built with {' '.join(lacks)}, which this CPU does not have",
            "problem",
            f"it was built on another machine and will crash here; build it here: {rebuild()}",
        )
    # AMX is left out on purpose where it crashes, see judge_amx
    idle = [name for name in has if name not in uses and not name.startswith("AMX")]
    if idle:
        return Finding(
            "instruction sets",
            f"{value}; the CPU also has {' '.join(idle)}",
            "note",
            f"prefill may be faster with a build for this CPU: {rebuild()}",
        )
    return Finding("instruction sets", value)


def judge_amx(flags: frozenset[str], built: frozenset[str], made_by: str) -> Finding:
    """The crash of llama.cpp's AMX kernels when GCC 12 has compiled them (SIGSEGV at ldtilecfg)."""
    if "amx_tile" not in flags:
        return Finding("AMX", "not on this CPU")
    if "AMX_INT8" not in built:
        return Finding("AMX", "on this CPU, not used by this build of llama.cpp")
    if re.match(r"GCC (?!12\.)|Clang", made_by):
        return Finding("AMX", f"used by llama.cpp, compiled by {made_by}")
    flags_line = f"-DCMAKE_C_FLAGS='{NO_AMX}' -DCMAKE_CXX_FLAGS='{NO_AMX}'"
    return Finding(
        "AMX",
        f"used by llama.cpp, compiled by {made_by}: Q4_0 and Q8_0 models crash (SIGSEGV)",
        "problem",
        f'CMAKE_ARGS="{flags_line}" {rebuild()}',
    )


def judge_cuda(has_device: bool, usable: bool, sentence: str) -> Finding:
    """Whether decoding on a GPU of llama.cpp is served."""
    if has_device and not usable:
        return Finding(
            "CUDA kernels",
            sentence,
            "note",
            "install nvcc (CUDA 12 or newer) and build pyfasa again: pip install --no-build-isolation .",
        )
    return Finding("CUDA kernels", sentence)


def judge_nodes(nodes: Mapping[str, int], verify_failures: int) -> Finding:
    """What became of the attention nodes of decode graphs; nodes by reason name."""
    total, sparse = sum(nodes.values()), nodes.get("sparse", 0)
    why = ", ".join(f"{name} {n}" for name, n in nodes.items() if n and name != "sparse")
    if verify_failures:
        return Finding(
            "decode",
            f"{verify_failures} entries of the side index differ from the K cache",
            "problem",
            "this is a bug of pyfasa; report it with the output of `pyfasa doctor --json`",
        )
    if total == 0:
        return Finding(
            "decode",
            "no flash-attention node in the graph",
            "problem",
            "create the model with flash_attn=True (the default of pyfasa.Llama)",
        )
    if sparse == 0:
        return Finding("decode", f"all attention nodes stay dense ({why})", "problem")
    if sparse < total:
        return Finding(
            "decode", f"{percent(sparse / total)} of attention is sparse; dense: {why}", "note"
        )
    return Finding("decode", "flash attention is on and every layer is sparse")


def judge_pairs(
    services: Mapping[Device, Mapping[Pair, Service]], type_k: str, type_v: str
) -> Finding:
    """Which K/V pairs flash attention serves on each device, and whether the asked one is among them."""
    topic, asked = "flash attention", (type_k, type_v)
    value = "; ".join(f"{device.name}: {_pairs(of)}" for device, of in services.items())
    value = f"{value}; asked for is {type_k}/{type_v}"
    slow = [device for device, of in services.items() if of[asked] != "served"]
    if not slow:
        return Finding(topic, value)
    names = " and ".join(device.name for device in slow)
    if not all(device.is_gpu for device in slow):
        remedy = f"{names} cannot compute it; use f16 or q8_0 for both, such as -ctk q8_0 -ctv q8_0"
        return Finding(topic, value, "problem", remedy)
    served = [f"{k}/{v}" for (k, v), how in services[slow[0]].items() if how == "served"]
    remedy = f"with the cache on {names} it is slow; use {' or '.join(served) or 'the CPU'}"
    kernel = not {"f32", "iq4_nl"} & set(asked)  # CUDA has none for these in any build
    if kernel and any(device.name.startswith("CUDA") for device in slow):
        flag = "-DGGML_CUDA=on -DGGML_CUDA_FA_QUANTS=all"  # formerly GGML_CUDA_FA_ALL_QUANTS
        remedy += f", or build llama.cpp for all pairs: CMAKE_ARGS='{flag}' {rebuild()}"
    return Finding(topic, value, "note", remedy)


def _pairs(services: Mapping[Pair, Service]) -> str:
    """`all 81 pairs`, or the pairs that are served by name, and what becomes of the others."""
    served = [f"{k}/{v}" for (k, v), how in services.items() if how == "served"]
    if len(served) == len(services):
        return f"all {len(served)} pairs of K and V types"
    parts = [", ".join(served) if 0 < len(served) <= 12 else f"{len(served)} pairs"]
    for how, told in (("converted", "converted to f16 for every token"), ("refused", "refused")):
        if n := sum(found == how for found in services.values()):
            parts.append(f"{n} {told}")
    return ", ".join(parts)


ROOM = 0.9  # of the memory: the buffers of a graph, and other programs, need some too


def judge_memory(
    topic: str,
    available: int | None,
    n_ctx: int,
    need: Footprint,
    q8_0: Footprint,
    otherwise: str = "",
) -> Finding:
    """Whether a context fits into so many bytes; None if the system does not tell how many.

    q8_0:      what is needed with a q8_0 cache, the same if it is one or smaller
    otherwise: a place that serves as well, and how; then what does not fit is no problem but a note
    """
    value = (
        f"{human_bytes(need.total(n_ctx))} at {n_ctx:,} tokens: weights {human_bytes(need.weights)}, "
        f"K/V {human_bytes(need.cache(n_ctx))}, side index "
        f"{human_bytes(need.total(n_ctx) - need.weights - need.cache(n_ctx))}"
    )
    if available is None:
        return Finding(topic, f"{value}; how much is available is not told")
    value += f"; available {human_bytes(available)}"
    room = int(ROOM * available)
    if need.total(n_ctx) <= room:
        return Finding(topic, value)
    ways = []
    if largest := need.largest_context(room):
        ways.append(f"a context of {largest:,} tokens (-c {largest})")
    if q8_0.cell < need.cell and (largest := q8_0.largest_context(room)):
        ways.append(f"-ctk q8_0 -ctv q8_0, up to {min(largest, n_ctx):,} tokens")
    if not ways:
        ways.append("a smaller quantization of the model")
    if otherwise:
        ways.append(otherwise)
    fits = need.total(n_ctx) <= available
    status: Status = "note" if fits or otherwise else "problem"
    return Finding(topic, value, status, f"use {', or '.join(ways)}")


def line(finding: Finding) -> str:
    """A finding as one line of text, with its remedy below."""
    mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.status]
    remedy = f"\n{'':8}-> {finding.remedy}" if finding.remedy else ""
    return f"{mark} {finding.topic}: {finding.value}{remedy}"
