"""A process in which llama.cpp has a CUDA device that is none: pyfasa's kernels run on the CPU, their threads in turns.

    python tests/emulated.py SITE SCRIPT [ARGUMENT]...

SITE is a folder that `make_site` has filled. What decides around the kernels is tested like that where there is no GPU:
segments, captured graphs, a token's head start.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "native" / "cuda" / "tests" / "emulation"
KERNELS = sorted(p.stem for p in (ROOT / "native" / "cuda").glob("*.cu") if p.stem != "device")
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-w", "-fvisibility=hidden", "-ffunction-sections"]
FLAGS += ["-ffp-contract=off", "-fno-strict-aliasing"]  # the index has the bytes of the CPU's
NAME = "libpyfasa_cuda.so"  # where pyfasa looks for the kernels


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "c++"))


def _libraries() -> Path:
    import llama_cpp

    return Path(llama_cpp.__file__).parent / "lib"


def make_site(folder: Path) -> Path:
    """pyfasa, and the device with its kernels beside it, in a folder of their own."""
    import llama_cpp

    from pyfasa import _native

    sources = [folder / f"{kernel}.cpp" for kernel in KERNELS]
    for kernel, source in zip(KERNELS, sources, strict=True):
        source.write_text(f'#include "{ROOT}/native/cuda/{kernel}.cu"\n')
    sources += [EMULATION / f"{name}.cpp" for name in ("emulation", "no_races", "device")]
    sources.append(ROOT / "native" / "tests" / "harness.cpp")
    headers = [EMULATION, ROOT / "native", ROOT / "native" / "tests"]
    headers.append(Path(llama_cpp.__file__).parents[1] / "include")

    def compiled(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        includes = [f"-I{header}" for header in headers]
        subprocess.run(
            [str(compiler()), *FLAGS, *includes, "-c", str(source), "-o", str(out)], check=True
        )
        return str(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    package = folder / "pyfasa"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pyfasa", package, ignore=ignored)
    shutil.copy(_native.__file__, package)
    needed = [str(_libraries() / f"lib{name}.so") for name in ("ggml-base", "ggml")]
    subprocess.run(
        [str(compiler()), "-shared", "-Wl,--gc-sections", "-Wl,-z,defs", *objects, *needed,
         "-o", str(package / NAME)],
        check=True,
    )  # fmt: skip
    return folder


def start(site: Path, script: Path, *arguments: str) -> subprocess.Popen[str]:
    """The script in a process that has the device."""
    command = [sys.executable, __file__, str(site), str(script), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def main() -> None:
    site, script = Path(sys.argv[1]), sys.argv[2]
    # An editable install finds its own pyfasa first.
    sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
    sys.path[:0] = [str(site)]
    import llama_cpp  # noqa: F401 - loads the libraries, of which one is asked for a second time here

    ggml = ctypes.CDLL(str(next(_libraries().glob("libggml.so.?"))))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    ggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
    if ggml.ggml_backend_load(os.fsencode(site / "pyfasa" / NAME)) is None:
        raise RuntimeError("llama.cpp did not take the device")
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
