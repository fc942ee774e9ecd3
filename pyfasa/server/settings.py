"""What the server can be told: all settings of llama-cpp-python's server, and those of ``pyfasa.Llama``.

A setting is looked for on the command line, then in the environment, then in the config file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp.server.settings as upstream
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

Values = dict[str, Any]
AnySettings = TypeVar("AnySettings", bound=BaseSettings)

# what tells models apart; where a config file lists several, only the file sets it
NAMES = ("model", "model_alias")


class ModelSettings(upstream.ModelSettings):
    """Settings of one model: llama-cpp-python's, with defaults that decode sparsely, and ours."""

    profile: str | bool | None = Field(
        default=None,
        description="Which chunks predict attention: a profile's file; false for dense decoding; "
        "default: the model's own, or <model>-fasa.gguf beside it.",
    )
    budget: int = Field(default=1024, description="Tokens that a head attends to.")
    n_fc: int | None = Field(default=None, description="Frequency chunks to score with.")
    index_bits: int | None = Field(default=None, description="1, 2, 4 or 8 bits per scored dim.")
    min_ctx: int | None = Field(default=None, description="Stay dense below this many tokens.")
    max_rows: int = Field(default=8, description="Tokens in one batch up to which it is decoding.")
    sinks: int = Field(default=4, description="First tokens, always attended.")
    recent: int = Field(default=32, description="Last tokens, always attended.")
    # ids stay valid; names are those of the KV cache types
    type_k: str | int | None = Field(  # type: ignore[assignment]
        default=None, description="Type of the K cache, such as q8_0; default: f16."
    )
    type_v: str | int | None = Field(  # type: ignore[assignment]
        default=None, description="Type of the V cache, such as q8_0; default: f16."
    )
    logits_all: bool = Field(
        default=False,
        description="Keep the logits of every token, which `logprobs` needs: "
        "n_ctx x vocabulary x 4 bytes of memory.",
    )
    flash_attn: bool = Field(default=True, description="Without it decoding is dense.")
    verbose: bool = Field(default=False, description="Let llama.cpp say what it does.")

    @model_validator(mode="before")
    @classmethod
    def _all_cpus(cls, values: Any) -> Any:
        """-1 threads are all CPUs, also where the number comes as text."""
        if isinstance(values, dict):
            for name in ("n_threads", "n_threads_batch"):
                if str(values.get(name)) == "-1":
                    values[name] = multiprocessing.cpu_count()
        return values

    @field_validator("profile")
    @classmethod
    def _no_profile(cls, value: str | bool | None) -> str | bool | None:
        if value is True:
            raise ValueError("a path or false is needed")
        return False if isinstance(value, str) and value.lower() == "false" else value

    @field_validator("type_k", "type_v")
    @classmethod
    def _type_id(cls, value: str | int | None) -> str | int | None:
        return int(value) if isinstance(value, str) and value.isdigit() else value


class ServerSettings(upstream.ServerSettings):
    """Settings of the server itself; a new request waits for its turn instead of ending another."""

    interrupt_requests: bool = Field(
        default=False, description="End a streamed answer when the next request comes."
    )
    page: bool = Field(
        default=True, description="A page at / to chat and to watch speed and depth."
    )


def read(arguments: Sequence[str]) -> tuple[ServerSettings, list[ModelSettings]]:
    """The settings from a command line, the environment and the config file that either names.

    ValueError says what is wrong with which setting; SystemExit for wrong usage and ``--help``.
    """
    given = {k: v for k, v in vars(_parser().parse_args(arguments)).items() if v is not None}
    if path := given.pop("path", None):
        given["model"] = path
    config_file = given.pop("config_file", None) or os.environ.get("CONFIG_FILE")
    file = _config(Path(config_file)) if config_file else {}
    models = file.pop("models", [{}])
    if not isinstance(models, list) or not models or not all(isinstance(m, dict) for m in models):
        raise ValueError(f'"models" in {config_file} must be a list of objects, one per model.')
    if len(models) > 1 and any(name in given for name in NAMES):
        raise ValueError(
            f"{config_file} lists {len(models)} models; leave the model out of the command line, or of the file."
        )
    of_server = {k: v for k, v in given.items() if k in ServerSettings.model_fields}
    of_models = {k: v for k, v in given.items() if k in ModelSettings.model_fields}
    server = _merged(ServerSettings, of_server, file)
    fixed = NAMES if len(models) > 1 else ()
    return server, [
        _merged(ModelSettings, {name: model.get(name) for name in fixed} | of_models, model)
        for model in models
    ]


def _merged(kind: type[AnySettings], given: Values, file: Mapping[str, Any]) -> AnySettings:
    """Settings from `given`, else the environment, else the file, else their defaults."""
    environment = {name.lower() for name in os.environ}
    values = {name: value for name, value in file.items() if name.lower() not in environment}
    try:
        return kind(**(values | given))
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"][:1])) or "A setting"
    if (name == "model" and first["input"] is None) or first["type"] == "missing":
        return f"No {name} is given; name one: pyfasa serve model.gguf."
    if first["type"] == "extra_forbidden":
        return f"{name} is no setting of the server; pyfasa serve --help lists them."
    return f"{name} is {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}."


def _config(path: Path) -> Values:
    """A config file, JSON or YAML by its name."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The config file {path} cannot be read: {error.strerror}.") from None
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)  # type: ignore[no-untyped-call]
        else:
            values = json.loads(text)
    except Exception as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"The config file {path} is damaged: {problem}.") from None
    if not isinstance(values, dict):
        raise ValueError(f'The config file {path} must be an object with "models" in it.')
    return values


class _Help(argparse.HelpFormatter):
    """Starts like the help of the other commands."""

    def add_usage(
        self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None
    ) -> None:
        super().add_usage(usage, actions, groups, prefix or "Usage: ")


def _parser() -> argparse.ArgumentParser:
    """Every setting as an option; values stay text, which the settings read as they read the environment."""
    parser = argparse.ArgumentParser(
        prog="pyfasa serve",
        usage="pyfasa serve [MODEL] [--SETTING VALUE ...]",
        description="Serve models over the OpenAI API. Every setting can also stand in the environment, in capitals, "
        "or in a config file.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("path", nargs="?", metavar="MODEL", help="A GGUF model.")
    parser.add_argument("--config_file", "--config-file", metavar="FILE", help="JSON or YAML.")
    for settings in (ModelSettings, ServerSettings):
        group = parser.add_argument_group("model" if settings is ModelSettings else "server")
        for name, field in settings.model_fields.items():
            _add_option(group, name, field)
    return parser


def _add_option(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    text = field.description or ""
    if "efault" not in text and not field.is_required() and field.default is not None:
        text += f" (default: {field.default})"
    origins = _origins(field.annotation)
    group.add_argument(
        *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
        dest=name,
        default=argparse.SUPPRESS,
        metavar="V",
        help=text.replace("%", "%%"),
        **({"nargs": "+"} if list in origins else {"type": json.loads} if dict in origins else {}),
    )


def _origins(annotation: Any) -> set[Any]:
    """`list[int] | None` -> {list, UnionType, ..}"""
    inner = (_origins(part) for part in typing.get_args(annotation))
    return {typing.get_origin(annotation)}.union(*inner)
