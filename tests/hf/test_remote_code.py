"""Code that comes with a model is never run, whatever stands on standard input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from darkformer import InputError
from darkformer.hf.load import load_config, load_model, load_tokenizer


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
