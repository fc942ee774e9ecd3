"""What is installed, whether FASA can work here, and what to do about each problem.

Nothing here raises for a bad installation: what fails becomes a finding with a remedy.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pyfasa.console import human_bytes, index_memory, percent
from pyfasa.embed import find_profile, sidecar_path
from pyfasa.flash_attention import services
from pyfasa.footprint import Footprint, cell_bytes, footprint
from pyfasa.identity import ModelIdentity
from pyfasa.judgements import (
    Finding,
    judge_amx,
    judge_cuda,
    judge_instructions,
    judge_memory,
    judge_nodes,
    judge_pairs,
)
from pyfasa.machine import (
    Device,
    available_memory,
    compiler,
    cpu,
    devices,
    pyfasa_version,
    rebuild,
    system_features,
)
from pyfasa.profile import Profile


def examine(type_k: str = "f16", type_v: str = "f16") -> list[Finding]:
    """The installation and the machine; of flash attention also whether it serves these types."""
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
        _attempt("flash attention", lambda: judge_pairs(services(), type_k, type_v), rebuild()),
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
    def told(device: Device) -> str:
        text = f"{device.name} ({device.type}): {device.description}"
        if not device.is_gpu:
            return text
        return f"{text}, {human_bytes(device.free)} of {human_bytes(device.total)} free"

    return Finding("devices", "; ".join(told(device) for device in devices(memory=True)))


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


def _cuda() -> Finding:
    from pyfasa import native

    has_device = any(d.name.startswith("CUDA") and d.is_gpu for d in devices())
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
    profile, found = _profile(path, model, n_ctx)
    need = footprint(path, model, profile, type_k, type_v)
    q8_0 = replace(need, cell=cell_bytes(model, "q8_0", "q8_0"))
    findings = [Finding("model", about), *found, *_memory(n_ctx, need, q8_0)]
    if live and profile is not None:
        findings.append(_attempt("decode", lambda: _decode(path, type_k, type_v), ""))
    return findings


def _profile(path: Path, model: ModelIdentity, n_ctx: int) -> tuple[Profile | None, list[Finding]]:
    """The profile of a model, None if there is none that fits, and what there is to say."""
    calibrate = f"pyfasa calibrate {path}"
    try:
        source = find_profile(path)
        if source is None:
            missing = f"none in {path.name}, and no {sidecar_path(path).name} beside it"
            return None, [Finding("profile", missing, "problem", calibrate)]
        profile = Profile.load(source)
        profile.check_model(model)
    except ValueError as error:
        return None, [Finding("profile", str(error), "problem", calibrate)]
    n_sparse = int((profile.bits[:, :, 0] > 0).any(axis=1).sum())
    index, kv = index_memory(profile, n_ctx)
    return profile, [
        Finding("profile", f"{source.name}: {profile.method}, {profile.n_fc} chunks in use"),
        Finding("layers with chunks", f"{n_sparse} of {model.n_layer}"),
        Finding(
            "side index",
            f"{human_bytes(index)} at {n_ctx:,} tokens, {percent(index / kv)} of the f16 K/V",
        ),
    ]


def _memory(n_ctx: int, need: Footprint, q8_0: Footprint) -> list[Finding]:
    """Whether the model fits into the GPUs, if there are any, and into the system's memory."""
    try:
        gpus = [device for device in devices(memory=True) if device.is_gpu]
    except Exception:  # told by examine
        gpus = []
    findings, elsewhere = [], ""
    if gpus:
        free = sum(device.free for device in gpus)
        less = (
            "fewer layers there (n_gpu_layers), or the cache in system memory (offload_kqv=False)"
        )
        findings.append(judge_memory("GPU memory", free, n_ctx, need, q8_0, less))
        if findings[0].status == "ok":
            elsewhere = "the GPU for all layers (n_gpu_layers=-1)"
    own = judge_memory("memory", available_memory(), n_ctx, need, q8_0, elsewhere)
    return [*findings, own]


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
