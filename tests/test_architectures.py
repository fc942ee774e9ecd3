"""FASA on random models of every architecture family, with the layers it replaces as golden data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

import zoo
from pyfasa.identity import ModelIdentity
from pyfasa.llama import kv_type
from support import (
    MAX_NMSE,
    decode,
    nmse,
    opened,
    opened_plain,
    random_profile,
    random_tokens,
)

F32 = npt.NDArray[np.float32]

N = 450
TOKENS = random_tokens(N + 4)
PROMPT, REST = TOKENS[:N], TOKENS[N:]
FEW: dict[str, Any] = {"budget": 64, "sinks": 2, "recent": 8}
SLIDING = [arch.name for arch in zoo.ZOO if "swa" in arch.nodes]
CLEARLY = 20 * MAX_NMSE


@pytest.fixture(scope="module", params=zoo.ZOO, ids=str)
def arch(request: pytest.FixtureRequest) -> zoo.Arch:
    found: zoo.Arch = request.param
    return found


@pytest.fixture(scope="module")
def path(arch: zoo.Arch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.write(tmp_path_factory.mktemp("zoo") / f"{arch}.gguf", arch.name)


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def types(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {name: kv_type(request.param, name) for name in ("type_k", "type_v")}


@pytest.fixture(scope="module")
def wanted(path: Path, types: dict[str, Any]) -> F32:
    return dense(path, **types)


def dense(path: Path, **arguments: Any) -> F32:
    """Logits of the rest by llama_cpp.Llama."""
    with opened_plain(path, **arguments) as plain:
        plain.eval(PROMPT)
        return decode(plain, REST)


@contextmanager
def verified(path: Path, **arguments: Any) -> Iterator[Any]:
    """A Llama that replaces whatever it can; all chunks, so that the best cells are found."""
    profile = random_profile(path, bits=(8,))
    with opened(path, profile=profile, min_ctx=0, **arguments) as llm:
        llm.fasa.verify = True
        yield llm
        assert llm.fasa.counters.verify_failures == 0


def sparse(path: Path, **arguments: Any) -> F32:
    with verified(path, **arguments) as llm:
        llm.eval(PROMPT)
        return decode(llm, REST)


def nodes(llm: Any) -> dict[str, int]:
    """Nodes since the last call, by reason."""
    found = {reason: n for reason, n in llm.fasa.counters.nodes.items() if n}
    llm.fasa.reset()
    return found


def times(golden: dict[str, int], n: int) -> dict[str, int]:
    return {reason: n * per_token for reason, per_token in golden.items()}


def test_identity_agrees_with_llama_cpp(arch: zoo.Arch, path: Path) -> None:
    found = ModelIdentity.read(path)
    assert found.architecture == arch.arch
    assert (found.head_dim, found.n_rot) == (arch.k_dim, arch.n_rot or arch.k_dim)
    assert found.rope_freq_base == arch.rope_base
    with opened_plain(path) as plain:
        model = plain._model.model
        assert found.n_layer == llama_cpp.llama_model_n_layer(model)
        assert found.n_head == llama_cpp.llama_model_n_head(model)
        assert found.n_head_kv == llama_cpp.llama_model_n_head_kv(model)
        rope = {0: "norm", 2: "neox"}[llama_cpp.llama_model_rope_type(model)]
        assert found.rope == rope


def test_everything_attended_is_dense(
    arch: zoo.Arch, path: Path, types: dict[str, Any], wanted: F32
) -> None:
    with verified(path, **types) as llm:
        llm.eval(PROMPT)
        assert nodes(llm) == {"prefill": arch.n_layer}
        found = decode(llm, REST)
        counters = llm.fasa.counters
        assert nodes(llm) == times(arch.nodes, len(REST))
        profile = llm.fasa.profile
    assert nmse(found, wanted) <= MAX_NMSE
    assert counters.cells_verified > 0
    visible = len(arch.full) * arch.n_head * sum(range(N + 1, N + 1 + len(REST)))
    assert counters.cells_attended == counters.cells_visible == visible
    per_cell = profile.bytes_per_cell().sum(axis=1)[list(arch.full)].sum()
    assert counters.index_bytes == 1024 * per_cell  # none for the other layers


def test_few_cells(arch: zoo.Arch, path: Path, types: dict[str, Any], wanted: F32) -> None:
    """The best 64 of 450 are not all, and come much nearer than those that one chunk finds."""
    errors = []
    with verified(path, **FEW, **types) as llm:
        llm.eval(PROMPT)
        for n_fc in (None, 1):
            llm.fasa.n_fc = n_fc
            llm.fasa.reset()
            llm.n_tokens = N
            errors.append(nmse(decode(llm, REST), wanted))
            attended = llm.fasa.counters.cells_attended
            assert attended == 64 * len(arch.full) * arch.n_head * len(REST)
            assert nodes(llm) == times(arch.nodes, len(REST))
    assert MAX_NMSE < errors[0] < errors[1] / 5


Written = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Written:
    def written(name: str, **variation: Any) -> Path:
        return zoo.write(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", name, **variation)

    return written


# With a window of one cell the soft-cap has no say in sliding layers: what differs is replaced.
CAPPED = {"attention.sliding_window": 1, "attn_logit_softcapping": 5.0}
VARIATIONS = [
    *(
        pytest.param(
            "gemma2",
            {"keys": CAPPED},
            {"keys": CAPPED | {"attn_logit_softcapping": cap}},
            id=f"gemma2-cap-{cap}",
        )
        for cap in (2.5, 50.0)
    ),
    pytest.param("gpt-oss", {}, {"sinks": -50.0}, id="gpt-oss-as-if-no-sinks"),
    pytest.param("gpt-oss", {}, {"sinks": zoo.SINKS + 2}, id="gpt-oss-larger-sinks"),
    pytest.param("mimo2", {}, {"sinks": None}, id="mimo2-no-sinks"),
]


@pytest.mark.parametrize(("name", "one", "other"), VARIATIONS)
def test_soft_cap_and_sinks_of_replaced_layers_matter(
    name: str, one: dict[str, Any], other: dict[str, Any], write: Written
) -> None:
    """Other values change both results clearly, and the two stay together."""
    paths = [write(name, **one), write(name, **other)]
    references = [dense(path) for path in paths]
    assert nmse(*references) > CLEARLY
    for path, reference in zip(paths, references, strict=True):
        assert nmse(sparse(path), reference) <= MAX_NMSE
    assert nmse(*(sparse(path, **FEW) for path in paths)) > CLEARLY


@pytest.mark.parametrize("name", SLIDING)
def test_the_window_of_sliding_layers_matters(name: str, write: Written) -> None:
    wider = write(name, keys={"attention.sliding_window": 2 * zoo.WINDOW})
    assert nmse(dense(wider), dense(write(name))) > CLEARLY


@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("name", SLIDING)
def test_small_and_full_caches_of_sliding_layers(
    name: str, swa_full: bool, types: dict[str, Any], write: Written
) -> None:
    """The small one holds 256 cells, of which most have been used again by now."""
    path = write(name)
    arguments = {"swa_full": swa_full, "n_batch": 128, "n_ubatch": 64, **types}
    reference = dense(path, **arguments)
    with verified(path, **arguments) as llm:
        llm.eval(PROMPT)
        llm.fasa.reset()
        assert nmse(decode(llm, REST), reference) <= MAX_NMSE
        assert nodes(llm) == times(zoo.BY_NAME[name].nodes, len(REST))
    assert nmse(sparse(path, **FEW, **arguments), reference) > MAX_NMSE


@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("name", SLIDING)
def test_a_context_that_grows_out_of_the_window(name: str, swa_full: bool, write: Written) -> None:
    """While all masks are alike nobody knows which layers slide: all are dense, bit for bit. Then
    it is known, and stays so when the context is short again."""
    path, golden = write(name), zoo.BY_NAME[name].nodes
    unknown = {"swa": sum(golden.values())}
    short = zoo.WINDOW - 3
    arguments = {"swa_full": swa_full}
    with opened_plain(path, **arguments) as plain:
        plain.eval(TOKENS[:short])
        reference = decode(plain, TOKENS[short : short + 8])
    with verified(path, **FEW | {"budget": 1024}, **arguments) as llm:
        for known in (False, True):
            llm.reset()
            llm.eval(TOKENS[:short])
            llm.fasa.reset()
            found, reasons = [], []
            for token in TOKENS[short : short + 8]:
                found.append(decode(llm, [token])[0])
                reasons.append(nodes(llm))
            n_alike = 0 if known else 3  # tokens that see everything through the window too
            assert reasons == [unknown] * n_alike + [golden] * (8 - n_alike)
            assert np.array_equal(np.array(found)[:n_alike], reference[:n_alike])
            assert nmse(found, reference) <= MAX_NMSE
