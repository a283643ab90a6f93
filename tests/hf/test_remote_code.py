"""Code that comes with a model is never run, whatever stands on standard input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from darkformer import InputError
from darkformer.hf.load import load_config, load_model, load_tokenizer
from hf.families import tiny


@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer])
def test_nobody_is_asked(load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "evilx", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": names}))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass C: pass\nM = T = C\n")
    with pytest.raises(InputError):
        load(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("name", ["somebody/kernel", "kernels-community/flash-attn2", "paged|somebody/kernel@main"])
def test_kernels_of_the_hub_are_not_fetched(
    key: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *a, **k: pytest.fail("fetched"))
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: name}))
    with pytest.raises(InputError, match="code from the hub, which is not run"):
        load_model(str(tmp_path))


def test_an_adapter_beside_a_model_does_not_take_its_place(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    (tmp_path / "model" / "m.gguf").write_bytes(b"GGUF")
    for source in ("model", "model/m.gguf"):
        for load in (load_config, load_model, load_tokenizer):
            with pytest.raises(InputError, match="is an adapter of another model"):
                load(str(tmp_path / source))


def test_the_config_that_is_looked_at_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    """Options that say where the files are count for both."""
    tiny("llama").save_pretrained(tmp_path / "inner")
    tiny("gpt2").save_pretrained(tmp_path)
    assert load_model(str(tmp_path), subfolder="inner").config.model_type == "llama"
    config = json.loads((tmp_path / "inner" / "config.json").read_text())
    (tmp_path / "inner" / "config.json").write_text(json.dumps({**config, "attn_implementation": "some/kernel"}))
    with pytest.raises(InputError, match="code from the hub"):
        load_model(str(tmp_path), subfolder="inner")
    assert load_model(str(tmp_path)).config.model_type == "gpt2"
