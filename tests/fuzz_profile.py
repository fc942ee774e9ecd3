"""Fuzzes the readers of profiles and model files: `make fuzz`, or `python tests/fuzz_profile.py -max_total_time=60`.

Any outcome but success, ProfileError or ModelFileError is a finding, and so is an input that takes seconds.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atheris
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(
    include=[
        "pyfasa.profile",
        "pyfasa.profile_checks",
        "pyfasa.gguf_header",
        "pyfasa.identity",
        "pyfasa.embed",
    ]
):
    from pyfasa import embed, gguf_header, identity
    from pyfasa import profile as profiles

from pyfasa.errors import ModelFileError, ProfileError
from test_identity import write_model
from test_profile import make_profile

SECONDS_PER_INPUT = 5
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
FOLDER = Path(tempfile.mkdtemp(prefix="pyfasa-fuzz-", dir=MEMORY))
TARGET = FOLDER / "model.gguf"
DTYPES = list(gguf_header.NUMBER_TYPES)
ODD_KEYS = ("general.alignment", "split.count", "llama.rope.dimension_sections", "x")
ODD_NUMBERS = (0, 1, 2, 7, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1, math.nan, math.inf, -1.0, 1e300)


@dataclass(frozen=True)
class Base:
    """A good file in parts: its key-value pairs, and what follows them."""

    pairs: dict[str, gguf_header.Value]
    n_tensors: int
    tensors: bytes
    data: bytes

    def file(self, pairs: dict[str, gguf_header.Value]) -> bytes:
        head = struct.pack("<4sIQQ", b"GGUF", 3, self.n_tensors, len(pairs))
        head += b"".join(profiles._pack(key, one) for key, one in pairs.items()) + self.tensors
        return head + bytes(-len(head) % 32) + self.data


def seeds() -> dict[str, bytes]:
    """Small valid files: sidecars, models of several kinds, a model with a profile inside."""
    make_profile().save(FOLDER / "profile.gguf")
    make_profile(bits=[[[8, 4, 2, 2, 0, 0, 0, 0]] * 2] * 2, center=None).save(FOLDER / "mixed.gguf")
    plain = write_model(FOLDER / "plain.gguf")
    write_model(FOLDER / "heads.gguf", "qwen3", changes={"attention.key_length": 16})
    write_model(FOLDER / "rope.gguf", "glm4", changes={"rope.dimension_sections": [0, 0, 0, 0]})
    whole = make_profile(identity.ModelIdentity.read(plain))
    embed.embed(plain, whole, FOLDER / "embedded.gguf")
    found = {path.name: path.read_bytes() for path in sorted(FOLDER.glob("*.gguf"))}
    for path in FOLDER.glob("*.gguf"):
        path.unlink()
    return found


def bases(files: Iterable[bytes]) -> list[Base]:
    found = []
    for content in files:
        TARGET.write_bytes(content)
        head = gguf_header.Header.read(TARGET)
        tensors = content[head.kv_end : head.info_end]
        found.append(Base(head.values, len(head.tensors), tensors, content[head.data_start :]))
    return found


def number(data: atheris.FuzzedDataProvider, dtype: np.dtype[Any]) -> np.generic:
    """Any bits, or a number that breaks careless code, as far as the type can hold it."""
    one = np.frombuffer(data.ConsumeBytes(dtype.itemsize).ljust(dtype.itemsize, b"\1"), dtype)[0]
    if data.ConsumeBool():
        odd = ODD_NUMBERS[data.ConsumeIntInRange(0, len(ODD_NUMBERS) - 1)]
        with contextlib.suppress(ValueError, OverflowError), np.errstate(over="ignore"):
            one = dtype.type(odd)
    found: np.generic = one
    return found


def value(data: atheris.FuzzedDataProvider) -> gguf_header.Value:
    """A value of any GGUF type."""
    if data.ConsumeIntInRange(0, 3) == 0:
        text: str = data.ConsumeUnicode(data.ConsumeIntInRange(0, 20))
        return text.encode("utf-8", "replace").decode()
    dtype = DTYPES[data.ConsumeIntInRange(0, len(DTYPES) - 1)]
    if data.ConsumeBool():
        return number(data, dtype)
    size = data.ConsumeIntInRange(0, 40)
    return np.array([number(data, dtype) for _ in range(size)], dtype)


def edited(data: atheris.FuzzedDataProvider, base: Base) -> bytes:
    """The file with keys removed, replaced, edited in one element, or of another length."""
    pairs = dict(base.pairs)
    keys = [*pairs, *ODD_KEYS]
    for _ in range(data.ConsumeIntInRange(1, 4)):
        key = keys[data.ConsumeIntInRange(0, len(keys) - 1)]
        old = pairs.get(key)
        how = data.ConsumeIntInRange(0, 4)
        if how == 0:
            pairs.pop(key, None)
        elif how == 1 or isinstance(old, str) or old is None:
            pairs[key] = value(data)
        elif not isinstance(old, np.ndarray):
            pairs[key] = number(data, old.dtype)
        elif old.size:
            new = old.copy()
            new[data.ConsumeIntInRange(0, old.size - 1)] = number(data, old.dtype)
            pairs[key] = new[: data.ConsumeIntInRange(0, old.size)] if how == 2 else new
    return base.file(pairs)


def one_input(raw: bytes) -> None:
    """The first byte says what the others are: a whole file, or the edits of a good one."""
    kind, content = (raw[0], raw[1:]) if raw else (0, raw)
    if kind >= 128:
        content = edited(atheris.FuzzedDataProvider(content), BASES[kind % len(BASES)])
    TARGET.write_bytes(content)
    for read in (
        gguf_header.Header.read,
        identity.ModelIdentity.read,
        profiles.Profile.load,
        embed.find_profile,
    ):
        try:
            found = read(TARGET)
        except (ProfileError, ModelFileError) as error:
            if TARGET.name not in str(error) and "rchitecture" not in str(error):
                raise AssertionError(f"{read} does not name the file: {error}") from error
            continue
        if isinstance(found, profiles.Profile):
            found.validate()
            again = FOLDER / "again.gguf"
            found.save(again, force=True)
            assert profiles.Profile.load(again) == found
        if isinstance(found, identity.ModelIdentity):
            rewrite(found)


def rewrite(model: identity.ModelIdentity) -> None:
    """A model that can be identified takes a profile, or a sentence says why not."""
    out = FOLDER / "out.gguf"
    if not all(1 <= n <= 64 for n in (model.n_layer, model.n_head_kv, model.head_dim)):
        return  # make_profile() would fail, or take all memory, before pyfasa is asked
    try:
        profile = make_profile(model)
        embed.embed(TARGET, profile, out, force=True)
        assert profiles.Profile.load(out) == profile
        embed.remove(out, out, force=True)
    except (ProfileError, ModelFileError):
        pass
    assert {path.name for path in FOLDER.iterdir()} <= {
        TARGET.name,
        "out.gguf",
        "again.gguf",
        "corpus",
    }


SEEDS = seeds()
BASES = bases(SEEDS.values())


def main() -> None:
    """Fuzzes in a child: libFuzzer ends its process itself, and the folder has to go."""
    child = os.fork()
    if child != 0:
        _, status = os.waitpid(child, 0)
        shutil.rmtree(FOLDER)
        sys.exit(os.waitstatus_to_exitcode(status))
    warnings.simplefilter("error")  # NumPy tells of damage in this way, too
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for name, content in SEEDS.items():
        (corpus / name).write_bytes(b"\0" + content)
    for i in range(len(BASES)):
        (corpus / f"edits-{i}").write_bytes(bytes([128 + i, *range(64)]))
    limits = [f"-timeout={SECONDS_PER_INPUT}", "-max_len=16384"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
