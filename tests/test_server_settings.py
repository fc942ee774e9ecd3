"""Settings of pyfasa serve: where they come from, and what is said about bad ones."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyfasa
from test_cli import call

for package in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
    pytest.importorskip(package, reason="the extra `server` is not installed")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfasa.server.settings import ModelSettings, ServerSettings

    known = {*ModelSettings.model_fields, *ServerSettings.model_fields, "config_file"}
    for name in [name for name in os.environ if name.lower() in known]:
        monkeypatch.delenv(name)


def read(*arguments: object) -> tuple[Any, list[Any]]:
    from pyfasa.server.settings import read as read_settings

    return read_settings([str(a) for a in arguments])


def config(folder: Path, **values: Any) -> Path:
    path = folder / "serve.json"
    path.write_text(json.dumps(values))
    return path


def test_defaults_are_those_of_the_class() -> None:
    from pyfasa.server.models import OURS

    _, (model,) = read("model.gguf")
    parameters = inspect.signature(pyfasa.Llama.__init__).parameters
    own = {name: parameter.default for name, parameter in parameters.items() if name in OURS}
    assert len(own) == len(OURS)
    assert {name: getattr(model, name) for name in OURS} == own
    assert model.flash_attn is parameters["flash_attn"].default
    assert model.logits_all is False


def test_every_setting_of_upstream_is_there() -> None:
    import llama_cpp.server.settings as upstream

    from pyfasa.server.settings import ModelSettings, ServerSettings

    assert set(upstream.ModelSettings.model_fields) < set(ModelSettings.model_fields)
    assert {*upstream.ServerSettings.model_fields, "page"} == set(ServerSettings.model_fields)
    code, out, _ = call("serve", "--help")
    assert code == 0
    for name in {*ModelSettings.model_fields, *ServerSettings.model_fields}:
        assert f"--{name} " in out


def test_command_line_over_environment_over_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(
        tmp_path,
        port=1,
        host="file",
        api_key="file",
        models=[{"model": "m.gguf", "budget": 1, "n_ctx": 1, "sinks": 1}],
    )
    for name in ("PORT", "HOST", "BUDGET", "N_CTX"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("CONFIG_FILE", str(file))
    server, (model,) = read("--port", 3, "--budget", 3)
    assert (server.port, server.host, server.api_key) == (3, "2", "file")
    assert (model.budget, model.n_ctx, model.sinks, model.model) == (3, 2, 1, "m.gguf")


def test_several_models_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"model": "a.gguf", "model_alias": "a"}, {"model": "b.gguf", "profile": False}]
    file = config(tmp_path, models=models)
    monkeypatch.setenv("MODEL", "other.gguf")
    monkeypatch.setenv("MODEL_ALIAS", "other")
    _, found = read("--config-file", file, "--recent", 16)
    assert [(m.model, m.model_alias, m.profile, m.recent) for m in found] == [
        ("a.gguf", "a", None, 16),
        ("b.gguf", None, False, 16),
    ]
    with pytest.raises(ValueError, match="lists 2 models; leave"):
        read("c.gguf", "--config-file", file)


def test_yaml(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "serve.yaml"
    path.write_text("port: 9\nmodels:\n  - model: a.gguf\n    budget: 64\n")
    server, (model,) = read("--config_file", path)
    assert (server.port, model.budget) == (9, 64)


def test_values_of_every_kind() -> None:
    _, (model,) = read(
        *("--model", "m.gguf", "--tensor_split", "0.5", "0.5", "--type-k", "q8_0", "--type_v", "8"),
        *("--chat_template_kwargs", '{"a": 1}', "--logits_all", "true", "--n_threads", "-1"),
        *("--profile", "False", "--rope-freq-base", "1e6"),
    )
    assert model.tensor_split == [0.5, 0.5]
    assert (model.type_k, model.type_v) == ("q8_0", 8)
    assert model.chat_template_kwargs == {"a": 1}
    assert model.logits_all is True
    assert model.n_threads == os.cpu_count()
    assert model.profile is False
    assert model.rope_freq_base == 1e6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "No model is given"),
        (["m.gguf", "--n_ctx", "many"], "n_ctx is 'many'"),
        (["m.gguf", "--cache_type", "tape"], "cache_type is 'tape'"),
        (["m.gguf", "--profile", ""], "m.gguf cannot be served: The model file"),
        (["m.gguf", "--budget", "0"], "budget"),
        (["m.gguf", "--type-k", "q3"], "type_k is 'q3'"),
        (["--config_file", "none.json"], "none.json cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments: list[str], words: str) -> None:
    code, _, err = call("serve", *arguments)
    assert code == 1
    assert err.count("error: ") == 1
    assert words in " ".join(err.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged"),
        ("[]", "must be an object"),
        ('{"models": []}', "must be a list"),
        ('{"prot": 1, "models": [{"model": "a"}]}', "prot is no setting"),
        ('{"models": [{"model": "a", "buget": 1}]}', "buget is no setting"),
    ],
)
def test_bad_config_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "serve.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read("--config_file", path)


def test_an_unknown_option_is_wrong_usage() -> None:
    code, _, err = call("serve", "m.gguf", "--bugdet", "3")
    assert code == 2
    assert "--bugdet" in err


def test_without_the_extra_it_is_named() -> None:
    script = "import sys; sys.modules['fastapi'] = None; from pyfasa.cli import main; sys.argv[1:] = ['serve']; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pyfasa serve needs the package fastapi; install the extra" in done.stderr
    assert "Traceback" not in done.stderr
