"""Arguments of the parent that rule FASA out, or cast doubt on the profile, are named in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from pyfasa import Llama, Profile
from pyfasa.embed import sidecar_path
from pyfasa.errors import DenseWarning, HostError, ProfileError
from support import NORM, decode, opened, opened_plain, random_tokens, warned

TOKENS = random_tokens(12)


def test_without_flash_attention(copied: Path, profile: Profile) -> None:
    profile.save(sidecar_path(copied))
    with pytest.raises(HostError, match="flash_attn is False, so there are no attention nodes"):
        Llama(str(copied), flash_attn=False, profile=profile)
    with pytest.warns(DenseWarning, match="flash_attn is False") as caught:
        x = Llama(str(copied), flash_attn=False, verbose=False, n_threads=2)
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="not attached to this context: flash_attn is False"):
        _ = x.fasa.counters
    x.eval(TOKENS[:9])
    with x.dense():
        found = decode(x, TOKENS[9:12])
    x.close()
    with opened_plain(copied, flash_attn=False) as plain:
        plain.eval(TOKENS[:9])
        assert np.array_equal(found, decode(plain, TOKENS[9:12]))


def test_settings_are_checked_without_flash_attention_too(copied: Path) -> None:
    with warned(), pytest.raises(ValueError, match="together exceed the budget 16"):
        Llama(str(copied), flash_attn=False, budget=16, verbose=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"rope_freq_base": 5000.0},
            "rope_freq_base is 5000.0, which changes the frequencies that the profile was calibrated with",
        ),
        ({"rope_freq_scale": 0.5}, r"rope_freq_scale is 0\.5, which changes the frequencies"),
        ({"kv_overrides": {"llama.rope.freq_base": 5000.0}}, r"rope\.?_?freq_base"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_other_frequencies(
    arguments: dict[str, Any], sentence: str, copied: Path, profile: Profile
) -> None:
    with pytest.raises(ProfileError, match=sentence):
        Llama(str(copied), profile=profile, verbose=False, **arguments)
    profile.save(sidecar_path(copied))
    with pytest.warns(DenseWarning, match=sentence) as caught, opened(copied, **arguments) as x:
        assert not x.fasa.active
    assert len(caught) == 1


def test_layers_that_are_spread_over_devices(copied: Path, profile: Profile) -> None:
    arguments = {"split_mode": llama_cpp.LLAMA_SPLIT_MODE_TENSOR, "n_gpu_layers": -1}
    sentence = r"split_mode is 3 \(LLAMA_SPLIT_MODE_TENSOR\), .* use LLAMA_SPLIT_MODE_LAYER"
    with pytest.raises(HostError, match=sentence):
        Llama(str(copied), profile=profile, verbose=False, **arguments)


def test_the_model_s_own_frequencies_may_be_named(path: Path, profile: Profile) -> None:
    arguments = {"rope_freq_base": 10000.0, "rope_freq_scale": 1.0}
    with opened(path, profile=profile, **arguments) as x:
        assert x.fasa.active


def test_vocab_only(copied: Path, profile: Profile) -> None:
    """There is nothing to decode, so nothing to warn about."""
    profile.save(sidecar_path(copied))
    with warned() as sentences, opened(copied, vocab_only=True) as x:
        assert x.tokenize(b"ab", add_bos=False)[-2:] == [3 + 97, 3 + 98]
        assert not x.fasa.active
    assert sentences == []


def test_a_lora_adapter_is_used_with_a_warning(
    path: Path, profile: Profile, tmp_path: Path
) -> None:
    adapter = tmp_path / "lora.gguf"
    w = gguf.GGUFWriter(adapter, "llama")
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    rng = np.random.default_rng(0)
    width = NORM.n_head * NORM.head_dim
    for part, shape in (("a", (4, width)), ("b", (width, 4))):
        w.add_tensor(f"blk.0.attn_q.weight.lora_{part}", rng.normal(size=shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.warns(DenseWarning, match="calibrated without this LoRA adapter") as caught:
        x = Llama(str(path), profile=profile, lora_path=str(adapter), verbose=False)
    assert len(caught) == 1
    assert x.fasa.active
    x.close()
