"""The binding itself: failures as sentences, names, layouts, the transform, and the signatures."""

from __future__ import annotations

import ast
import inspect
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyfasa import native
from pyfasa._native import ffi, lib
from pyfasa.errors import HostError
from pyfasa.native import call, host, profile_file, session, stages
from test_index import HEADS, Head, every_head, fresh_rng
from test_profile import make_identity, make_profile

ROOT = Path(__file__).resolve().parents[1]


def layout(**changes: Any) -> native.Layout:
    values: dict[str, Any] = {
        "head_dim": 64, "n_rot": 64, "rope": "norm",
        "chunks": np.array([0, 5, 9], np.uint16), "bits": np.array([4, 4, 2], np.uint8),
    }  # fmt: skip
    return native.Layout(**(values | changes))


def blank_score(
    one: native.Layout, index: native.U8, n_q: int, blocks: tuple[int, int] | None = None
) -> None:
    """score of zeros on one block."""
    q, scores = np.zeros((n_q, 64), np.float32), np.zeros((n_q, 64), np.float32)
    peaks = np.zeros((n_q, 8), np.float32)
    native.score(native.ISA_AUTO, one, q, index, np.zeros(1, np.uint64), scores, peaks, blocks)


def sentence(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Zbhn].*\.", text, re.DOTALL)) and len(text) > 20


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "exception"),
    [
        (lib.FASA_STATUS_ARGUMENT, ValueError),
        (lib.FASA_STATUS_HOST, HostError),
        (lib.FASA_STATUS_MEMORY, MemoryError),
        (lib.FASA_STATUS_STATE, RuntimeError),
    ],
)
def test_a_status_becomes_its_exception(status: int, exception: type[Exception]) -> None:
    with pytest.raises(exception) as caught:
        call.check(status)
    assert type(caught.value) is exception


def test_success_raises_nothing() -> None:
    call.check(lib.FASA_STATUS_OK)


def test_the_last_error_belongs_to_its_thread() -> None:
    with pytest.raises(ValueError, match="n_rot is 7"):
        layout(n_rot=7)
    other: list[str] = []
    thread = threading.Thread(target=lambda: other.append(call.text(lib.fasa_last_error())))
    thread.start()
    thread.join()
    assert "n_rot is 7" in call.text(lib.fasa_last_error())
    assert "n_rot is 7" not in other[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": -64}, "head_dim is -64"),
        ({"head_dim": 63}, "head_dim is 63.*even"),
        ({"head_dim": 258}, "head_dim is 258.*256"),
        ({"n_rot": 0}, "n_rot is 0"),
        ({"n_rot": 31}, "n_rot is 31.*even"),
        ({"n_rot": 66}, "n_rot is 66.*64"),
        ({"chunks": np.empty(0, np.uint16), "bits": np.empty(0, np.uint8)}, "n_fc is 0"),
        ({"chunks": np.zeros(33, np.uint16), "bits": np.full(33, 4, np.uint8)}, "n_fc is 33.*32"),
        ({"chunks": np.array([0, 32, 1], np.uint16)}, "Chunk 32 is out of range.*32"),
        ({"chunks": np.array([0, 65535, 1], np.uint16)}, "Chunk 65535 is out of range"),
        ({"chunks": np.array([3, 1, 3], np.uint16)}, "Chunk 3 is listed twice"),
        ({"bits": np.array([4, 3, 2], np.uint8)}, "Chunk 5 has 3 bits"),
        ({"bits": np.array([4, 4, 0], np.uint8)}, "Chunk 9 has 0 bits"),
        ({"bits": np.array([4, 4], np.uint8)}, "2 values; 3 are needed"),
        ({"bits": np.array([4, 4, 2])}, "contiguous array of uint8"),
        ({"chunks": np.array([0, 5, 9])}, "contiguous array of uint16"),
        ({"chunks": np.arange(6, dtype=np.uint16)[::2]}, "contiguous False"),
        ({"scale": np.ones(63, np.float32)}, "63 values; 64 are needed"),
        ({"scale": np.zeros(64, np.float32)}, "scale 0"),
        ({"scale": np.full(64, -1, np.float32)}, "scale -1"),
        ({"scale": np.full(64, np.nan, np.float32)}, "scale.*nan"),
        ({"scale": np.full(64, np.inf, np.float32)}, "scale.*inf"),
        ({"center": np.full(64, np.nan, np.float32)}, "center.*nan"),
        ({"center": np.full(64, -np.inf, np.float32)}, "center.*inf"),
        ({"center": np.zeros(64)}, "contiguous array of float32"),
    ],
)  # fmt: skip
def test_layout_arguments_out_of_range(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        layout(**changes)
    assert sentence(str(caught.value))


def test_channels_that_are_not_kept_may_hold_anything() -> None:
    scale = np.full(64, np.nan, np.float32)
    scale[[0, 1, 10, 11, 18, 19]] = 1
    layout(scale=scale)


@pytest.mark.parametrize("isa", [-2, lib.FASA_ISA_COUNT, 1000])
def test_unknown_instruction_sets_are_refused(isa: int) -> None:
    with pytest.raises(ValueError, match=f"Instruction set {isa} is unknown") as caught:
        native.select(isa, np.zeros(64, np.float32), np.zeros(8, np.float32), 1)
    assert sentence(str(caught.value))


def test_instruction_sets_that_this_cpu_lacks_are_refused() -> None:
    missing = [isa for isa in native.isas() if not native.isa_usable(isa)]
    if not missing:
        pytest.skip("this CPU runs all of them")
    for isa in missing:
        with pytest.raises(ValueError, match="cannot run") as caught:
            native.select(isa, np.zeros(64, np.float32), np.zeros(8, np.float32), 1)
        assert native.isa_name(native.isa_best()) in str(caught.value)


@pytest.mark.parametrize("n_q", [0, 65])
def test_a_group_of_no_or_too_many_heads_is_refused(n_q: int) -> None:
    one = layout()
    index = np.zeros((1, one.block_bytes), np.uint8)
    with pytest.raises(ValueError, match="1 to 64 query heads"):
        blank_score(one, index, n_q)


@pytest.mark.parametrize("blocks", [(-1, 1), (1, 0), (0, 2), (2, 2)])
def test_blocks_outside_the_index_are_refused(blocks: tuple[int, int]) -> None:
    one = layout()
    index = np.zeros((1, one.block_bytes), np.uint8)
    with pytest.raises(ValueError, match="range of blocks"):
        blank_score(one, index, 1, blocks)


@pytest.mark.parametrize("cell", [-1, 64, 2**40])
def test_cells_outside_the_index_are_refused(cell: int) -> None:
    one = layout()
    index = np.full((1, one.block_bytes), 0xAA, np.uint8)
    with pytest.raises(ValueError, match=r"[Cc]ell"):
        native.index_write(one, np.zeros((1, 64), np.float32), np.array([cell]), index)
    assert (index == 0xAA).all()


# ---- names and sizes -----------------------------------------------------------------------------


def test_instruction_sets_have_names() -> None:
    names = [native.isa_name(isa) for isa in native.isas()]
    assert names == ["reference", "portable", "AVX2", "AVX-512 VNNI"]
    assert native.isa_name(native.ISA_AUTO) == "auto"
    assert native.isa_name(99) == "unknown"


def test_the_best_instruction_set_is_usable() -> None:
    assert native.isa_usable(native.ISA_REFERENCE)
    assert native.isa_usable(native.ISA_PORTABLE)
    assert native.isa_usable(native.isa_best())
    assert native.isa_best() == max(isa for isa in native.isas() if native.isa_usable(isa))
    assert not native.isa_usable(-1)
    assert not native.isa_usable(lib.FASA_ISA_COUNT)


def test_ggml_is_the_one_that_was_built_against() -> None:
    built, loaded = native.ggml_versions()
    assert built == loaded
    assert re.fullmatch(r"\d+\.\d+\.\d+", built)


def test_reasons_are_named_once_each() -> None:
    reasons = native.reasons()
    assert len(reasons) == lib.FASA_REASON_COUNT
    assert next(iter(reasons)) == "sparse"
    assert all(sentence(text) for text in reasons.values())


def test_constants_are_those_of_the_c_interface() -> None:
    assert (native.BLOCK_CELLS, native.PEAKS) == (64, 8)
    assert (native.KV_TYPES["f16"], native.KV_TYPES["q8_0"]) == (1, 8)


@every_head
def test_block_bytes_are_those_that_a_profile_counts(head: Head) -> None:
    drawn = head.draw(fresh_rng())
    identity = make_identity(
        n_layer=1, n_head_kv=1, head_dim=head.dim, n_rot=head.n_rot, rope=head.rope
    )
    profile = make_profile(
        identity, chunks=drawn.chunks[None, None], bits=drawn.bits[None, None],
        center=None, scale=None, n_fc=head.n_fc,
    )  # fmt: skip
    assert profile.bytes_per_cell().item() * native.BLOCK_CELLS == drawn.layout.block_bytes


def test_block_bytes_by_hand() -> None:
    """Two chunks of 4 bits fill a quad, one of 2 bits takes another; each segment has its steps."""
    assert layout().block_bytes == (64 + 64 * 4 * 4 // 8) + (64 + 64 * 4 * 2 // 8)


# ---- Hadamard ------------------------------------------------------------------------------------


def sylvester(size: int) -> native.F32:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128, 256])
def test_hadamard_is_the_sylvester_matrix_and_its_own_inverse(size: int) -> None:
    x = fresh_rng().normal(size=(5, size)).astype(np.float32)
    kept = x.copy()
    once = native.hadamard(x)
    np.testing.assert_allclose(once, x @ sylvester(size), atol=1e-5)
    np.testing.assert_allclose(native.hadamard(once), x, atol=1e-5)
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("size", [3, 48, 80])
def test_hadamard_needs_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match=r"power of two\.$"):
        native.hadamard(np.zeros(size, np.float32))


# ---- signatures ----------------------------------------------------------------------------------


def declared() -> dict[str, int]:
    """Functions of the cdef and how many arguments they take."""
    text = (ROOT / "native" / "fasa.cdef.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found = re.findall(r"(fasa_\w+)\s*\(([^()]*)\)\s*;", text)
    return {name: 0 if args.strip() == "void" else args.count(",") + 1 for name, args in found}


def test_every_declared_function_is_bound() -> None:
    functions = declared()
    assert len(functions) > 25
    for name, n_args in functions.items():
        kind = ffi.typeof(getattr(lib, name))
        assert kind.kind == "function", name
        assert len(kind.args) == n_args, name


def test_the_wrapper_calls_every_function_that_is_declared() -> None:
    """A function that Python does not use is either dead or forgotten."""
    sources = "".join(
        inspect.getsource(module) for module in (call, host, profile_file, session, stages)
    )
    used = set(re.findall(r"lib\.(fasa_\w+)", sources))
    assert used == set(declared())


@pytest.mark.parametrize(
    ("record", "struct"),
    [
        (native.Config, "fasa_config"),
        (native.Counters, "fasa_counters"),
        (native.Timings, "fasa_timings"),
    ],
)
def test_dataclasses_have_the_fields_of_their_structs(record: type, struct: str) -> None:
    ours = list(record.__dataclass_fields__)
    theirs = [name for name, _ in ffi.typeof(struct).fields]
    assert ours == theirs


def test_the_counters_have_room_for_every_reason() -> None:
    assert ffi.sizeof("fasa_counters") == (13 + lib.FASA_REASON_COUNT) * 8


def test_the_stub_knows_the_module() -> None:
    """The stub declares what type checkers need."""
    stub = Path(native.__file__).parents[1] / "_native.pyi"
    names = {
        target.id if isinstance(target, ast.Name) else ""
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, (ast.AnnAssign, ast.Assign))
        for target in ([node.target] if isinstance(node, ast.AnnAssign) else node.targets)
    }
    assert {"ffi", "lib"} <= names


def test_heads_of_the_stage_tests_cover_what_a_layout_allows() -> None:
    assert {head.rope for head in HEADS} == {"norm", "neox"}
    assert {head.bits for head in HEADS} == {0, 1, 2, 4, 8}
    assert any(head.n_rot < head.dim for head in HEADS)
    assert any(head.n_fc % 2 for head in HEADS)
