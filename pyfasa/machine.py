"""Facts about this machine and the libraries on it: CPU, devices, memory, versions. No judgement."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEVICE_TYPES = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # enum ggml_backend_dev_type


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


def available_memory() -> int | None:
    """Bytes that new allocations may take without swapping; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


@dataclass(frozen=True)
class Device:
    """A ggml backend device; memory in bytes, 0 where nobody asked or the backend does not tell."""

    name: str
    description: str
    type: str  # one of DEVICE_TYPES
    free: int = 0
    total: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.type in ("GPU", "IGPU")


def devices(memory: bool = False) -> list[Device]:
    """The ggml backend devices that llama.cpp would use.

    memory: also ask for their memory, for which CUDA starts up on each of its devices
    """
    lib = libggml()
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(lib, name).restype = ctypes.c_char_p
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    pointer = ctypes.POINTER(ctypes.c_size_t)
    lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, pointer, pointer]
    lib.ggml_backend_dev_memory.restype = None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        dev = lib.ggml_backend_dev_get(i)
        kind = lib.ggml_backend_dev_type(dev)
        if memory:
            lib.ggml_backend_dev_memory(dev, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                lib.ggml_backend_dev_name(dev).decode(),
                lib.ggml_backend_dev_description(dev).decode(),
                DEVICE_TYPES[kind] if kind < len(DEVICE_TYPES) else str(kind),
                free.value,
                total.value,
            )
        )
    return found


def ggml_string(function: str) -> str:
    """The result of `const char * function(void)` in the loaded ggml: ggml_version, ggml_commit."""
    call = getattr(libggml(), function)
    call.restype = ctypes.c_char_p
    text: bytes = call()
    return text.decode()


def libggml() -> ctypes.CDLL:
    """The ggml that llama.cpp has loaded."""
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
