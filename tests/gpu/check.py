"""FASA on a CUDA device against FASA on the CPU: the same model, tokens and settings; and what the counters say.

    python tests/gpu/check.py MODEL [TOKENS]
    python tests/gpu/check.py --quick

Exits with 1 when something is not as it should be. MODEL needs a profile, or gets a random one. Quick: random models,
few tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

import llama_cpp
import numpy as np

import pyfasa
from pyfasa import demo, machine, native
from pyfasa.embed import find_profile
from pyfasa.identity import ModelIdentity
from pyfasa.profile import Profile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

failures = 0


def expect(what: str, ok: bool, detail: object = "") -> None:
    global failures
    failures += not ok
    print(f"{'ok   ' if ok else 'FAIL '} {what} {detail}", flush=True)


def finish() -> None:
    """Says how it went, and ends the process."""
    print("all as it should be" if failures == 0 else f"{failures} FAILED")
    sys.exit(failures > 0)


def profile_of(path: Path) -> Profile:
    if (found := find_profile(path)) is not None:
        return Profile.load(found)
    from support import random_profile

    return random_profile(path, bits=(4,), n_fc=ModelIdentity.read(path).head_dim // 4)


def opened(path: Path, **arguments: object) -> pyfasa.Llama:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pyfasa.Llama(str(path), verbose=False, **arguments)


def last_logits(llm: pyfasa.Llama) -> np.ndarray:
    """Those of the last row; llama.cpp's own memory, until it decodes again."""
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), shape=(llm.n_vocab(),))


def logits(
    path: Path, tokens: list[int], n_decode: int, rows: int = 1, **arguments: object
) -> tuple[np.ndarray, pyfasa.Llama]:
    """Logits of the last `n_decode` tokens, decoded `rows` at a time; the model is left open."""
    llm = opened(path, n_ctx=len(tokens) + 64, **arguments)
    out = []
    prompt = len(tokens) - n_decode
    llm.eval(tokens[:prompt])
    llm.fasa.reset()
    for at in range(prompt, len(tokens), rows):
        llm.eval(tokens[at : at + rows])
        out.append(last_logits(llm).copy())
    return np.array(out), llm


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compare(path: Path, tokens: list[int], kv: str, budget: int, n_decode: int) -> None:
    name = f"{kv}, budget {budget}:"
    profile = profile_of(path)
    common = {
        "type_k": kv,
        "type_v": kv,
        "profile": profile,
        "budget": budget,
        "min_ctx": 2 * budget,
    }
    gpu, llm = logits(path, tokens, n_decode, n_gpu_layers=-1, **common)
    counters = llm.fasa.counters
    n_layer = int((profile.bits[:, :, 0] > 0).any(axis=1).sum())
    expect(f"{name} sparse nodes", counters.nodes["sparse"] == n_layer * n_decode, counters.nodes)
    expect(
        f"{name} cells attended",
        0 < counters.cells_attended < counters.cells_visible,
        f"{counters.cells_attended} of {counters.cells_visible}",
    )
    # The index after all that is what a rebuild makes of K.
    llm.fasa.verify = True
    for token in tokens[-2:]:
        llm.eval([token])
    expect(
        f"{name} index verified",
        llm.fasa.counters.verify_failures == 0,
        llm.fasa.counters.verify_failures,
    )
    llm.fasa.verify = False
    dense = llm.fasa.counters.nodes["sparse"]
    with llm.dense():
        llm.eval(tokens[-1:])
    expect(f"{name} dense inside dense()", llm.fasa.counters.nodes["sparse"] == dense)
    llm.eval(tokens[-1:])
    llm.fasa.verify = True
    llm.eval(tokens[-1:])
    expect(f"{name} index rebuilt after dense()", llm.fasa.counters.verify_failures == 0)
    llm.close()

    cpu, llm = logits(path, tokens, n_decode, n_gpu_layers=0, offload_kqv=False, **common)
    llm.close()
    exact, llm = logits(
        path, tokens, n_decode, n_gpu_layers=-1, **(common | {"budget": len(tokens), "min_ctx": 1})
    )
    llm.close()
    full, llm = logits(path, tokens, n_decode, n_gpu_layers=-1, **(common | {"profile": False}))
    llm.close()
    plain, llm = logits(
        path, tokens, n_decode, n_gpu_layers=0, offload_kqv=False, **(common | {"profile": False})
    )
    llm.close()
    # Upstream's own two backends differ by this much: rounding in a cache of 4 bits goes a long way.
    between = difference(full, plain)
    expect(
        f"{name} logits as on the CPU",
        difference(gpu, cpu) < 0.01 + 1.5 * between,
        f"{difference(gpu, cpu):.4f}, dense {between:.4f}",
    )
    expect(
        f"{name} budget of all cells is dense attention",
        difference(exact, full) < 0.01 + 1.5 * between,
        f"{difference(exact, full):.4f}",
    )
    rows, llm = logits(path, tokens, n_decode, rows=4, n_gpu_layers=-1, **common)
    expect(
        f"{name} batches of 4 rows are sparse",
        llm.fasa.counters.nodes["sparse"] == n_layer * n_decode // 4,
    )
    llm.close()
    # Logits of a batch's last row; earlier rows of the batch see the same cells as one by one.
    expect(
        f"{name} batches of 4 rows",
        difference(rows, gpu[3::4]) < 0.01 + 1.5 * between,
        f"{difference(rows, gpu[3::4]):.4f}",
    )
    expect(
        f"{name} a small budget is not",
        difference(gpu, full) > 1e-6,
        f"{difference(gpu, full):.4f}",
    )


def retrieval(path: Path, n_token: int = 8000, n_question: int = 20) -> None:
    """Answers about facts in a document: the GPU finds those that the CPU finds, as FASA and as dense attention."""
    found = {}
    for device, arguments in {
        "GPU": {"n_gpu_layers": -1},
        "CPU": {"n_gpu_layers": 0, "offload_kqv": False},
    }.items():
        settings = demo.Settings(
            model=path, n_tokens=n_token, n_questions=n_question, budget=256, seed=3, n_threads=None
        )
        llm = opened(path, n_ctx=n_token + demo.ROOM, budget=256, min_ctx=512, **arguments)
        document = demo.hide(llm, settings)
        asked = list(demo.interview(llm, document, n_question, write=lambda text: None))
        found[device] = {name: demo.right(asked, name) for name in ("dense", "fasa")}
        llm.close()
    expect(
        f"right answers of {n_question} at {n_token} tokens, budget 256",
        all(abs(found["GPU"][name] - found["CPU"][name]) <= 1 for name in ("dense", "fasa")),
        found,
    )


def split(path: Path, tokens: list[int], n_decode: int = 16) -> None:
    """A part of the layers on the GPU; and, where there are several, layers over all of them."""
    common = {
        "type_k": "f16",
        "type_v": "f16",
        "profile": profile_of(path),
        "budget": 256,
        "min_ctx": 512,
    }
    n_layer = ModelIdentity.read(path).n_layer
    n_gpu = sum(d.type == "GPU" for d in machine.devices())
    whole, llm = logits(path, tokens, n_decode, n_gpu_layers=-1, split_mode=0, **common)
    llm.close()
    ways = {f"{n_layer // 2} of {n_layer} layers on the GPU": {"n_gpu_layers": n_layer // 2}}
    if n_gpu > 1:
        ways[f"layers over {n_gpu} GPUs"] = {
            "n_gpu_layers": -1,
            "split_mode": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
            "tensor_split": [1.0] * n_gpu,
        }
    for name, arguments in ways.items():
        parts, llm = logits(path, tokens, n_decode, **arguments, **common)
        nodes = llm.fasa.counters.nodes["sparse"]
        llm.fasa.verify = True
        llm.eval(tokens[-1:])
        expect(f"{name}: all layers are sparse", nodes == n_layer * n_decode, nodes)
        expect(f"{name}: logits", difference(parts, whole) < 0.05, difference(parts, whole))
        expect(f"{name}: index verified", llm.fasa.counters.verify_failures == 0)
        llm.close()


# Models of tests/zoo.py with sliding windows: llama.cpp has a soft-cap on CUDA for heads of 128 and 256 only.
SLIDING = {"gemma2": {"k_dim": 128}, "gemma3": {}, "gpt-oss": {}}


def windows(tokens: list[int], n_decode: int = 24) -> None:
    """Layers with a window stay dense and the others do not, as on the CPU; with a small and a full cache for them."""
    import zoo

    with tempfile.TemporaryDirectory() as folder:
        for name, variation in SLIDING.items():
            path = zoo.write(Path(folder) / f"{name}.gguf", name, **variation)
            golden = zoo.BY_NAME[name].nodes
            for kv in ("f16", "q8_0"):
                for swa_full in (False, True):
                    layers(path, golden, tokens, n_decode, kv, swa_full)
            growing(path, golden, tokens)
        divided(Path(folder) / "gemma2.gguf", tokens)


def nodes(llm: pyfasa.Llama) -> dict[str, int]:
    return {reason: n for reason, n in llm.fasa.counters.nodes.items() if n}


def layers(
    path: Path, golden: dict[str, int], tokens: list[int], n_decode: int, kv: str, swa_full: bool
) -> None:
    """Nodes by reason, logits and index of a model with windows; several batches, so that cells are used again."""
    from support import random_profile

    name = f"{path.stem} {kv}, {'full' if swa_full else 'small'} cache of windows:"
    common = {
        "type_k": kv,
        "type_v": kv,
        "profile": random_profile(
            path, bits=(8,)
        ),  # all chunks: rounding swaps cells of little weight
        "budget": 256,
        "min_ctx": 512,
        "swa_full": swa_full,
        "n_batch": 128,
        "n_ubatch": 64,
    }
    on_gpu = {"n_gpu_layers": -1}
    on_cpu = {"n_gpu_layers": 0, "offload_kqv": False}
    wanted = {reason: n * n_decode for reason, n in golden.items()}
    found = {}
    for device, arguments in {"GPU": on_gpu, "CPU": on_cpu}.items():
        found[device], llm = logits(path, tokens, n_decode, **arguments, **common)
        expect(f"{name} nodes on the {device}", nodes(llm) == wanted, nodes(llm))
        attended, visible = llm.fasa.counters.cells_attended, llm.fasa.counters.cells_visible
        expect(f"{name} cells attended on the {device}", 0 < attended < visible, attended)
        llm.fasa.verify = True
        for token in tokens[-2:]:
            llm.eval([token])
        expect(f"{name} index on the {device}", llm.fasa.counters.verify_failures == 0)
        llm.close()
    full, llm = logits(path, tokens, n_decode, **on_gpu, **(common | {"profile": False}))
    llm.close()
    plain, llm = logits(path, tokens, n_decode, **on_cpu, **(common | {"profile": False}))
    llm.close()
    apart, between = difference(found["GPU"], found["CPU"]), difference(full, plain)
    expect(
        f"{name} logits as on the CPU",
        apart < 0.01 + 1.5 * between,
        f"{apart:.4f}, dense {between:.4f}",
    )
    expect(f"{name} a small budget is not dense", difference(found["GPU"], full) > 1e-6)


def growing(path: Path, golden: dict[str, int], tokens: list[int], pad: int = 256) -> None:
    """Without a prompt masks are read when n_kv grows: until then the layers are not told apart, and all are dense."""
    llm = opened(
        path, n_gpu_layers=-1, n_ctx=1024, profile=profile_of(path), budget=64, min_ctx=128
    )
    unknown = {"swa": sum(golden.values())}
    llm.eval(tokens[:4])
    for known in (False, True):
        while llm.n_tokens < (pad if not known else 2 * pad):
            llm.fasa.reset()
            llm.eval([tokens[llm.n_tokens]])
            if nodes(llm) != (golden if known else unknown):
                break
        expect(
            f"{path.stem}: nodes while {llm.n_tokens} tokens have been decoded",
            nodes(llm) == (golden if known else unknown),
            nodes(llm),
        )
    llm.close()


def divided(path: Path, tokens: list[int], n_decode: int = 8) -> None:
    """Layers 1 and 3 of 4 are full. A device that has one layer only cannot compare it, and leaves it dense."""
    for n_gpu_layers, n_sparse in {3: 2, 2: 1}.items():  # the last of them is the output's
        _, llm = logits(
            path,
            tokens,
            n_decode,
            n_gpu_layers=n_gpu_layers,
            profile=profile_of(path),
            budget=256,
            min_ctx=512,
        )
        wanted = {"sparse": n_sparse * n_decode, "swa": (4 - n_sparse) * n_decode}
        name = f"{path.stem}, {n_gpu_layers - 1} of 4 layers on the GPU:"
        expect(f"{name} nodes", nodes(llm) == wanted, nodes(llm))
        llm.fasa.verify = True
        llm.eval(tokens[-1:])
        expect(f"{name} index verified", llm.fasa.counters.verify_failures == 0)
        llm.close()


def free_memory() -> int:
    return sum(d.free for d in machine.devices(memory=True) if d.is_gpu)


def endurance(path: Path, n_decode: int = 20_000, n_prompt: int = 2000) -> None:
    """Many tokens decoded, each the likeliest after the one before: no memory is lost, and the index stays K's."""
    llm = opened(
        path,
        n_ctx=n_prompt + n_decode + 64,
        n_gpu_layers=-1,
        profile=profile_of(path),
        budget=256,
        min_ctx=512,
        type_k="q8_0",
        type_v="q8_0",
    )
    llm.eval(np.random.default_rng(11).integers(3, 250, n_prompt).tolist())
    start, free = time.perf_counter(), []
    for i in range(n_decode):
        row = last_logits(llm)
        if not np.isfinite(row).all():
            expect(f"logits of token {i} are finite", False)
            break
        llm.eval([int(row.argmax())])
        if i % 2000 == 1999:
            free.append(free_memory())
    seconds = time.perf_counter() - start
    lost = [free[0] - later for later in free]
    expect(
        f"{n_decode} tokens decoded: device memory lost since token 2,000",
        max(lost) <= 0,
        f"{lost} bytes, {n_decode / seconds:.0f} tokens/s",
    )
    sparse = llm.fasa.counters.nodes["sparse"]
    llm.fasa.verify = True
    llm.eval([5])
    expect("their index is what a rebuild makes of K", llm.fasa.counters.verify_failures == 0)
    n_layer = ModelIdentity.read(path).n_layer
    expect("all of them were sparse", sparse == n_layer * n_decode, sparse)
    llm.close()


def quick(rng: np.random.Generator) -> None:
    import zoo
    from support import Shape, write_model

    tokens = [int(t) for t in rng.integers(3, 250, 700)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "small.gguf", Shape(n_head=2, n_head_kv=1))
        for kv in ("f16", "q8_0", "q4_0", "bf16"):
            compare(path, tokens, kv, 64, 12)
        split(path, tokens)
        for name, variation in SLIDING.items():
            path = zoo.write(Path(folder) / f"{name}.gguf", name, **variation)
            layers(path, zoo.BY_NAME[name].nodes, tokens, 8, "q8_0", swa_full=name == "gemma3")
        divided(Path(folder) / "gemma2.gguf", tokens)


def whole(path: Path, tokens: list[int]) -> None:
    for kv in ("f16", "q8_0", "q4_0", "bf16"):
        compare(path, tokens, kv, 256, 24)
    split(path, tokens)
    windows(tokens[:1500])
    if find_profile(path) is not None:
        retrieval(path)
        endurance(path)


def main() -> None:
    print("CUDA:", native.cuda()[1])
    expect("CUDA kernels are loaded", native.cuda()[0])
    print("; ".join(f"{d.name}: {d.description}" for d in machine.devices()))
    rng = np.random.default_rng(7)
    if "--quick" in sys.argv:
        quick(rng)
    else:
        whole(
            Path(sys.argv[1]),
            [int(t) for t in rng.integers(3, 250, int((sys.argv[2:] or [3000])[0]))],
        )
    finish()


if __name__ == "__main__":
    main()
