"""What is installed, whether FASA can work here, and what to do about each problem.

Nothing here raises for a bad installation: what fails becomes a finding with a remedy.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyfasa.console import human_bytes, index_memory, percent
from pyfasa.embed import find_profile, sidecar_path
from pyfasa.identity import ModelIdentity
from pyfasa.profile import Profile

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
DEVICE_TYPES = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # enum ggml_backend_dev_type


@dataclass(frozen=True)
class Finding:
    """One line of the report. "problem": FASA cannot work; "note": it could work better."""

    topic: str
    value: str
    status: Status = "ok"
    remedy: str = ""


# ---- facts about the machine and the libraries --------------------------------------------------


@dataclass(frozen=True)
class Cpu:
    """flags: as in /proc/cpuinfo; empty where the system does not tell."""

    model: str
    cores: int
    flags: frozenset[str]


def cpu() -> Cpu:
    """The CPU of this machine; cores are those that this process may use."""
    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        model = match[1].strip()
    if match := re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE):
        flags = frozenset(match[1].split())
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return Cpu(model, len(affinity(0)) if affinity else os.cpu_count() or 1, flags)


@dataclass(frozen=True)
class Device:
    name: str
    description: str
    type: str  # one of DEVICE_TYPES


def devices() -> list[Device]:
    """The ggml backend devices that llama.cpp would use."""
    lib = _libggml()
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(lib, name).restype = ctypes.c_char_p
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        dev = lib.ggml_backend_dev_get(i)
        kind = lib.ggml_backend_dev_type(dev)
        found.append(
            Device(
                lib.ggml_backend_dev_name(dev).decode(),
                lib.ggml_backend_dev_description(dev).decode(),
                DEVICE_TYPES[kind] if kind < len(DEVICE_TYPES) else str(kind),
            )
        )
    return found


def ggml_string(function: str) -> str:
    """The result of `const char * function(void)` in the loaded ggml: ggml_version, ggml_commit."""
    call = getattr(_libggml(), function)
    call.restype = ctypes.c_char_p
    text: bytes = call()
    return text.decode()


def _libggml() -> ctypes.CDLL:
    from llama_cpp import _ggml

    lib: ctypes.CDLL = _ggml.libggml
    return lib


def pyfasa_version() -> str:
    """The installed version; "not installed" when the sources are imported from a folder."""
    try:
        return importlib.metadata.version("pyfasa")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def rebuild() -> str:
    """The command that builds llama-cpp-python anew here: pip would else take its cached wheel."""
    name = "llama-cpp-python"
    try:
        wanted = importlib.metadata.requires("pyfasa") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    pinned = next((w for w in wanted if w.startswith(name)), name)
    return f"pip install --force-reinstall --no-cache-dir --no-binary {name} '{pinned}'"


def system_features(info: str) -> dict[str, frozenset[str]]:
    """`CPU : AVX2 = 1 | FMA = 1 | ` -> {"CPU": {"AVX2", "FMA"}}; what is 0 is left out."""
    found: dict[str, frozenset[str]] = {}
    for match in re.finditer(r"(\w+) : ((?:\w+ = \S+ \| )*)", info):
        pairs = re.findall(r"(\w+) = (\S+) \|", match[2])
        found[match[1]] = frozenset(name for name, value in pairs if value != "0")
    return found


def compiler(library: Path) -> str:
    """The compiler that made a shared library ("GCC 12.2.0"), or "unknown compiler"."""
    try:
        data = library.read_bytes()
    except OSError:
        return "unknown compiler"
    gcc = re.search(rb"GCC: \([^)]*\) (\d+\.\d+\.\d+)", data)
    clang = re.search(rb"clang version (\d+\.\d+\.\d+)", data)
    for name, match in (("Clang", clang), ("GCC", gcc)):
        if match:
            return f"{name} {match[1].decode()}"
    return "unknown compiler"


# ---- judgements, pure ---------------------------------------------------------------------------


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


# ---- examinations -------------------------------------------------------------------------------


def examine() -> list[Finding]:
    """The installation and the machine."""
    machine = cpu()
    findings = [
        Finding("pyfasa", pyfasa_version()),
        Finding("Python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("CPU", f"{machine.model}, {machine.cores} cores"),
    ]
    try:
        import llama_cpp  # noqa: F401
    except Exception as error:
        return [*findings, Finding("llama-cpp-python", str(error), "problem", rebuild())]
    return [
        *findings,
        _attempt("llama-cpp-python", _llama_cpp, rebuild()),
        _attempt("ggml", _ggml, "reinstall pyfasa against the installed llama-cpp-python"),
        _attempt("instruction sets", lambda: _judge(judge_instructions), rebuild()),
        _attempt("AMX", lambda: _judge(judge_amx), rebuild()),
        _attempt("devices", _devices, rebuild()),
        _attempt("pyfasa kernels", _kernels, "reinstall pyfasa"),
        _attempt("CUDA kernels", _cuda, "reinstall pyfasa with nvcc on the PATH"),
        _attempt("hook", _hook, f"reinstall both: {rebuild()}, then pyfasa"),
    ]


def _attempt(topic: str, look: Callable[[], Finding], remedy: str) -> Finding:
    try:
        return look()
    except Exception as error:
        return Finding(topic, f"{type(error).__name__}: {error}", "problem", remedy)


def _judge(judge: Callable[[frozenset[str], frozenset[str], str], Finding]) -> Finding:
    """Applies a judgement to this CPU and the installed build of llama.cpp."""
    import llama_cpp

    info = llama_cpp.llama_print_system_info().decode()
    library = Path(llama_cpp.__file__).parent / "lib" / "libggml-cpu.so"
    return judge(cpu().flags, system_features(info).get("CPU", frozenset()), compiler(library))


def _devices() -> Finding:
    found = [f"{device.name} ({device.type}): {device.description}" for device in devices()]
    return Finding("devices", "; ".join(found))


def _llama_cpp() -> Finding:
    import llama_cpp

    from pyfasa.attach import SUPPORTED_LLAMA_CPP

    topic, version = "llama-cpp-python", llama_cpp.__version__
    if version == SUPPORTED_LLAMA_CPP:
        return Finding(topic, f"{version}, the supported version")
    value = f"{version}; this pyfasa supports {SUPPORTED_LLAMA_CPP} only"
    return Finding(topic, value, "problem", f"pip install {topic}=={SUPPORTED_LLAMA_CPP}")


def _ggml() -> Finding:
    from pyfasa import native

    built, loaded = native.ggml_versions()
    if built != loaded:
        raise RuntimeError(f"pyfasa was built against {built or 'none'}, loaded is {loaded}")
    return Finding("ggml", f"{loaded}, as pyfasa was built against")


def _kernels() -> Finding:
    from pyfasa import native

    usable = [native.isa_name(isa) for isa in native.isas() if native.isa_usable(isa)]
    return Finding(
        "pyfasa kernels", f"{native.isa_name(native.isa_best())} (of {' '.join(usable)})"
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


def _cuda() -> Finding:
    from pyfasa import native

    has_device = any(d.name.startswith("CUDA") and d.type == "GPU" for d in devices())
    return judge_cuda(has_device, *native.cuda())


def _hook() -> Finding:
    from pyfasa import native

    native.self_test()
    return Finding("hook", "live: the CPU backend can be decorated and computes the right numbers")


def examine_model(
    path: Path, *, n_ctx: int = 32768, type_k: str = "f16", type_v: str = "f16", live: bool = True
) -> list[Finding]:
    """A model and its profile. live: decode two tokens, to see which layers go sparse."""
    try:
        model = ModelIdentity.read(path)
    except ValueError as error:
        return [Finding("model", str(error), "problem")]
    about = (
        f"{model.name}: {model.architecture}, {model.n_layer} layers, {model.n_head} heads, "
        f"{model.n_head_kv} KV heads, head size {model.head_dim}, rope {model.rope}"
    )
    findings = [Finding("model", about)]
    calibrate = f"pyfasa calibrate {path}"
    try:
        source = find_profile(path)
        if source is None:
            missing = f"none in {path.name}, and no {sidecar_path(path).name} beside it"
            return [*findings, Finding("profile", missing, "problem", calibrate)]
        profile = Profile.load(source)
        profile.check_model(model)
    except ValueError as error:
        return [*findings, Finding("profile", str(error), "problem", calibrate)]
    n_sparse = int((profile.bits[:, :, 0] > 0).any(axis=1).sum())
    index, kv = index_memory(profile, n_ctx)
    findings += [
        Finding("profile", f"{source.name}: {profile.method}, {profile.n_fc} chunks in use"),
        Finding("layers with chunks", f"{n_sparse} of {model.n_layer}"),
        Finding(
            "side index",
            f"{human_bytes(index)} at {n_ctx:,} tokens, {percent(index / kv)} of the f16 K/V",
        ),
    ]
    if live:
        findings.append(_attempt("decode", lambda: _decode(path, type_k, type_v), ""))
    return findings


def _decode(path: Path, type_k: str, type_v: str) -> Finding:
    """Decodes two tokens with FASA on and the index verified."""
    from pyfasa.llama import Llama

    llm = Llama(
        str(path),
        n_ctx=256,
        budget=64,
        min_ctx=1,
        type_k=type_k,
        type_v=type_v,
        verbose=False,
    )
    try:
        if not llm.fasa.active:
            return Finding("decode", f"dense: {llm.fasa.reason}", "problem")
        llm.eval([0] * 96)
        llm.fasa.verify = True
        llm.fasa.reset()
        for _ in range(2):
            llm.eval([0])
        return judge_nodes(llm.fasa.counters.nodes, llm.fasa.counters.verify_failures)
    finally:
        llm.close()


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


def line(finding: Finding) -> str:
    """A finding as one line of text, with its remedy below."""
    mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.status]
    remedy = f"\n{'':8}-> {finding.remedy}" if finding.remedy else ""
    return f"{mark} {finding.topic}: {finding.value}{remedy}"
