"""pyfasa/_native.pyi, native/fasa.cdef.h and the compiled module name the same things."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import cffi
import llama_cpp  # noqa: F401  loads the libraries that the compiled module needs
import pytest

import pyfasa
from pyfasa._native import ffi, lib

ROOT = Path(__file__).resolve().parents[1]
CDEF = ROOT / "native" / "fasa.cdef.h"


@pytest.fixture(scope="module")
def stub() -> ast.ClassDef:
    tree = ast.parse((Path(pyfasa.__file__).parent / "_native.pyi").read_text())
    (found,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "_Lib"
    )
    return found


@pytest.fixture(scope="module")
def declared() -> tuple[dict[str, int], dict[str, int]]:
    """Functions with their number of arguments, and constants with their values."""
    parser = cffi.FFI()
    parser.cdef(CDEF.read_text())
    functions: dict[str, int] = {}
    constants: dict[str, int] = {}
    for name, (declared_type, _) in parser._parser._declarations.items():
        kind, _, short = name.partition(" ")
        if kind == "function":
            functions[short] = len(declared_type.args)
        elif kind in ("enum", "anonymous"):
            constants.update(zip(declared_type.enumerators, declared_type.enumvalues, strict=True))
    assert len(functions) > 20
    assert len(constants) > 20
    return functions, constants


def test_functions(stub: ast.ClassDef, declared: tuple[dict[str, int], dict[str, int]]) -> None:
    methods = [node for node in stub.body if isinstance(node, ast.FunctionDef)]
    counts = {m.name: len(m.args.posonlyargs) + len(m.args.args) - 1 for m in methods}
    assert counts == declared[0]


def test_constants(stub: ast.ClassDef, declared: tuple[dict[str, int], dict[str, int]]) -> None:
    names = [node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)]  # type: ignore[union-attr]
    assert sorted(names) == sorted(declared[1])


def test_the_compiled_module(declared: tuple[dict[str, int], dict[str, int]]) -> None:
    functions, constants = declared
    public = {name for name in dir(lib) if not name.startswith("_")}
    assert public == set(functions) | set(constants)
    assert {name: getattr(lib, name) for name in constants} == constants
    for name, count in functions.items():
        assert len(ffi.typeof(getattr(lib, name)).args) == count


def test_comments_and_code_agree_on_the_number_of_reasons() -> None:
    """fasa_counters.nodes has a plain number as its length: the header has no preprocessor."""
    length = re.search(r"int64_t nodes\[(\d+)\]", CDEF.read_text())
    assert length is not None
    assert int(length[1]) == lib.FASA_REASON_COUNT
