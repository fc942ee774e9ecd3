"""What this CPU and this llama.cpp can do."""

from __future__ import annotations

from pyfasa._native import lib
from pyfasa.native.call import check, text


def isa_best() -> int:
    """Id of the best instruction set of this CPU."""
    best: int = lib.fasa_isa_best()
    return best


def isa_name(isa: int) -> str:
    """Name of an instruction set for printing."""
    return text(lib.fasa_isa_name(isa))


def isa_usable(isa: int) -> bool:
    """Whether this CPU and build can run it."""
    return bool(lib.fasa_isa_usable(isa))


def isas() -> list[int]:
    """Ids of all instruction sets that this build knows, the reference first."""
    return list(range(lib.FASA_ISA_COUNT))


def ggml_versions() -> tuple[str, str]:
    """Version of ggml that the core was built against, and of the one that is loaded."""
    return text(lib.fasa_ggml_built()), text(lib.fasa_ggml_loaded())


def self_test() -> None:
    """Proves that llama.cpp's CPU backend can be decorated; raises HostError with the cause if not."""
    check(lib.fasa_self_test())


def reasons() -> dict[str, str]:
    """Why attention nodes are replaced or left dense: name to sentence, in the order of the core."""
    return {
        text(lib.fasa_reason_name(i)): text(lib.fasa_reason_text(i))
        for i in range(lib.FASA_REASON_COUNT)
    }


def fail_allocations(successes: int) -> None:
    """Fault injection: allocations of side indexes and work space fail after ``successes`` more; -1: none fails."""
    lib.fasa_fail_allocations(successes)


def pays_from_cuda(k_type: int, group: int) -> int:
    """From how many budgets on selecting pays on a CUDA device; group: query heads per KV head."""
    budgets: int = lib.fasa_pays_from_cuda(k_type, group)
    return budgets


def cuda() -> tuple[bool, str]:
    """Whether decode graphs of llama.cpp's CUDA devices are served, and a sentence about it."""
    return bool(lib.fasa_cuda_usable()), text(lib.fasa_cuda_text())
