"""The model card: every number is the record's, and the upload takes card and weights. No hub is asked."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError

from darkformer import ConfigError, DarkConfig, InputError, RunFolderError, TrainConfig
from darkformer.records import environment
from darkformer.train.card import model_card, push_run


def _score(loss: float) -> dict[str, Any]:
    return {"loss": loss, "perplexity": 2.0**loss, "accuracy": 0.4321, "tokens": 4088}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return {
        "command": "linearize", "model": "HuggingFaceTB/SmolLM2-135M", "data": ["/home/someone/books/*.txt", "pydoc"],
        "held_out": [], "config": DarkConfig(num_features=96).to_dict(),
        "budget": vars(TrainConfig(steps=3, seq_len=512, batch_size=2)),
        "environment": environment(), "losses": [3.0, 2.9, 2.8], "calibration": [],
        "scores": {"softmax": _score(2.5), "converted": _score(2.75), "finetuned": _score(2.625)},
    }  # fmt: skip


def test_metadata(record: dict[str, Any]) -> None:
    data = model_card(record, "me/smol-dark").data
    assert (data.base_model, data.library_name) == (record["model"], "transformers")
    assert data.pipeline_tag == "text-generation"
    assert "darkformer" in data.tags and data.license is None  # the base's, which the record does not know
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"perplexity": 2.0**2.625, "accuracy": 0.4321}


def test_text(record: dict[str, Any]) -> None:
    text = model_card(record, "me/smol-dark").text
    assert text.startswith("\n# smol-dark") or text.startswith("# smol-dark")
    for line in (
        "| softmax, before | 2.5000 | 5.66 | 43.21% | 4088 |",
        "| finetuned | 2.6250 | 6.17 | 43.21% | 4088 |",
        'from_pretrained("me/smol-dark")',
        "Finetuned for 3 steps of 2 × 512 tokens (`train=all`)",
        "| num_features | 96 |",
    ):
        assert line in text, line
    for field in (*DarkConfig().to_dict(), *vars(TrainConfig())):
        assert f"| {field} |" in text
    for name, version in record["environment"]["versions"].items():
        assert f"{name} {version}" in text
    assert "/home/someone" not in text and "*.txt, pydoc" in text
    assert "{" not in text.replace("{}", "")


def test_a_calibrated_model_and_a_local_base(record: dict[str, Any]) -> None:
    local = {**record, "model": "/data/models/SmolLM2.Q4_1.gguf", "losses": []}
    local["scores"] = {name: record["scores"][name] for name in ("softmax", "converted")}
    card = model_card(local)
    assert card.data.base_model is None and "Calibrated, not finetuned" in card.text
    assert "/data/models" not in str(card) and 'from_pretrained(".")' in card.text
    assert card.data.eval_results[0].metric_value == 2.0**2.75


def test_a_budget_says_what_was_converted_and_what_is_kept(record: dict[str, Any]) -> None:
    asked = DarkConfig(num_features=96)
    chosen = replace(asked, window=256, keep_exact=("3.1",), layer_windows=((2, 128),))
    choice = {"size": 1_000_000, "softmax": 9_000_000, "length": 8192}  # features are not counted in it
    made = {
        **record, "memory": "20%", "converted_config": chosen.to_dict(), "choice": choice, "kept_bytes": 1_700_000,
    }  # fmt: skip
    text = model_card(made).text
    assert "Softmax stays in 3.1" in text and "window 256 (some layers differ), 4 sinks" in text
    assert "Within a budget of 20%: 1.7 MB at 8,192 tokens, softmax 9.0 MB." in text
    assert "| window | 256 |" in text and "['3.1']" in text
    everything = {**made, "memory": "100%", "converted_config": replace(asked, method="exact").to_dict()}
    assert "Softmax stays everywhere" in model_card(everything).text


def test_a_card_counts_the_features_that_are_left(record: dict[str, Any]) -> None:
    rows = [{"layer": 0, "features": [False, False]}, {"layer": 1, "features": [False, True]}]
    local = {**record, "converted_config": DarkConfig(method="local").to_dict()}
    for made, features in (
        (record, "96 features"), ({**record, "calibration": rows}, "96 features"), (local, "no features"),
        ({**record, "calibration": rows[:1]}, "no features"),
        ({**record, "calibration": rows, "transfer": rows[:1]}, "no features"),
    ):  # fmt: skip
        assert f"{features}, window 64" in model_card(made).text


def test_the_card_reads_back(record: dict[str, Any], tmp_path: Path) -> None:
    card = model_card(record, "me/smol-dark")
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()


def test_other_records_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a record of 'demo'"):
        model_card({**record, "command": "demo"})


class TestPush:
    @pytest.fixture
    def run(self, record: dict[str, Any], tmp_path: Path) -> Path:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        (tmp_path / "record.json").write_text(json.dumps(copy.deepcopy(record)))
        return tmp_path

    def test_takes_the_model_and_its_card(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, dict[str, Any]]] = []
        monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **o: calls.append((repo, o)))

        def upload(self: HfApi, **options: Any) -> str:
            calls.append((options["repo_id"], options))
            assert ModelCard.load(Path(options["folder_path"]) / "README.md").data.model_name == "smol-dark"
            return "https://huggingface.co/me/smol-dark"

        monkeypatch.setattr(HfApi, "upload_folder", upload)
        assert push_run(run, "me/smol-dark", private=True).endswith("me/smol-dark")
        assert calls[0] == ("me/smol-dark", {"private": True, "exist_ok": True})
        assert calls[1][1]["folder_path"] == run / "model"

    def test_a_refusal_is_one_clear_error(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: HfApi, *words: Any, **options: Any) -> None:
            raise HFValidationError("no such name")

        monkeypatch.setattr(HfApi, "create_repo", refuse)
        with pytest.raises(InputError, match=r"bad name: the hub refused \(HFValidationError: no such name\)"):
            push_run(run, "bad name")

    def test_an_unfinished_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunFolderError, match="no finished run"):
            push_run(tmp_path, "me/x")


HOSTILE = "a[/](evil) | `b`\n---\n# c <script> \x1b[31m _d_ \ud800"


def test_names_are_not_markdown(record: dict[str, Any], tmp_path: Path) -> None:
    """And a card with any name can be written: it is what a finished run ends with."""
    card = model_card({**record, "model": HOSTILE, "data": [HOSTILE], "held_out": ["[" + "x" * 300 + "]*.txt"]})
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    assert "\n# c" not in again.text and "<script>" not in again.text.replace("\\<", "") and "\x1b" not in again.content
    assert r"a[/\](evil) \| \`b\` --- # c \<script\> \\x1b[31m \_d\_ \\ud800" in again.text
    assert len(again.data.eval_results) == 2 and again.data.library_name == "transformers"


@pytest.mark.parametrize(
    "change",
    [
        {"scores": "x"}, {"scores": {}}, {"model": [1]}, {"environment": None}, {"data": [[1]]}, {"config": []},
        {"converted_config": {"method": "`x`"}}, {"converted_config": None}, {"losses": 3}, {"choice": 3},
        {"budget": {"batch_size": 1, "seq_len": 2, "train": "`x`"}}, {"scores": {"softmax": {"loss": "x"}}},
    ],
)  # fmt: skip
def test_an_edited_record_is_refused_by_name(record: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises((InputError, ConfigError)):
        model_card({**record, **change})
