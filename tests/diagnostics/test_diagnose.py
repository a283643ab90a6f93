"""The diagnosis of a tiny model: rows, pictures, page; and what cannot be measured is a marked row, never a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from darkformer import ConfigError, DarkConfig, InputError
from darkformer.diagnostics.layer import Effort
from darkformer.diagnostics.report import PICTURES, print_diagnosis, write_diagnosis
from darkformer.diagnostics.run import diagnose
from darkformer.diagnostics.summary import HELPS, what_helps

CONFIG = DarkConfig(num_features=16, window=8, sinks=2)
EFFORT = Effort(counts=(4, 16, 64), tokens=64, pairs=16, draws=256, queries=8, noise_draws=64)
BLOCKS = torch.randint(1, 99, (4, 64), generator=torch.Generator().manual_seed(0))


def _model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.15,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return diagnose(_model(), BLOCKS, CONFIG, EFFORT)


def _record(result: dict[str, Any]) -> dict[str, Any]:
    effort = {"draws": EFFORT.draws, "tokens": EFFORT.tokens}
    return {"model": "tiny", "config": CONFIG.to_dict(), "effort": effort, "environment": {}, **result}


def test_every_head_has_a_row_and_the_model_is_as_before(result: dict[str, Any]) -> None:
    assert [(r["layer"], r["head"]) for r in result["rows"]] == [(i, g) for i in range(3) for g in range(2)]
    assert all(r["problem"] is None for r in result["rows"]) and result["problems"] == []
    model = _model()
    before = model(BLOCKS[:1]).logits
    diagnose(model, BLOCKS, CONFIG, EFFORT, layers=[1])
    assert torch.equal(model(BLOCKS[:1]).logits, before)


def test_rows_hold_together(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert sum(row["mass"].values()) == pytest.approx(1, abs=1e-6)
        assert 1 <= row["key"]["effective_rank"] <= 8
        assert 1 <= row["effective"] <= 16 and row["underflow"] == 0
        assert row["default_error"][8][16] <= row["exact_part_error"][8] + 1e-9  # the search may turn features off
        assert 0 < row["bound"] <= row["first_order"]
        assert row["inadmissible"] == sum(v >= 0.5 for v in row["balanced"]["eigenvalues"])
        above = row["optimality"]["log_times_bound"]
        assert all(value >= 0 for value in above.values()) and row["optimality"]["helps"] in HELPS
        assert row["optimality"]["scale"] in row["by_scale"]["scales"]
    assert sum(result["recommendations"]["helps"].values()) == 6


def test_windows_leave_the_features_most_of_the_text(result: dict[str, Any]) -> None:
    assert set(result["recommendations"]["window"]["mean_error"]) == {8, 16}  # the configured one, a quarter of 64


@pytest.mark.parametrize(
    ("log_least", "isotropic", "optimal", "m", "helps"),
    [
        (6.0, 0.1, 0.1, 128, "colder"),  # e^6 = 403 of the best draws give an error as large as the kernel
        (6.0, 0.1, 0.1, 512, "features"),
        (2.0, 3.0, 1.0, 128, "optimal"),
        (2.0, 3.0, 2.5, 128, "features"),
        (-2.0, 0.1, 0.1, 128, "nothing"),
        (-2.0, 3.0, 0.1, 128, "optimal"),
    ],
)
def test_what_helps(log_least: float, isotropic: float, optimal: float, m: int, helps: str) -> None:
    above = {"isotropic": isotropic, "oprf": isotropic, "optimal": optimal}
    assert what_helps({"log_least": log_least, "log_times_bound": above}, m) == helps


def test_one_layer_only() -> None:
    assert {r["layer"] for r in diagnose(_model(), BLOCKS, CONFIG, EFFORT, layers=[1])["rows"]} == {1}


def test_pictures_page_and_table(result: dict[str, Any], tmp_path: Path) -> None:
    record = json.loads(json.dumps(_record(result)))
    page = write_diagnosis(record, tmp_path).read_text()
    assert page.count("data:image/png") == len(PICTURES)
    assert {p.stem for p in (tmp_path / "plots").glob("*.png")} == {name for name, *_ in PICTURES}
    console = Console(record=True, width=100)
    print_diagnosis(_record(result), console)
    text = console.export_text()
    assert "Rank correlation" in text and "--window" in text
    assert "× the least that any 16 draws can have" in " ".join(text.split())


class TestBadInput:
    def test_an_unknown_layer(self) -> None:
        with pytest.raises(ConfigError, match=r"--layer 7: no such attention layer; this model has 0 to 2"):
            diagnose(_model(), BLOCKS, CONFIG, EFFORT, layers=[7])

    def test_too_few_tokens(self) -> None:
        with pytest.raises(InputError, match=r"dimension 8 needs 16"):
            diagnose(_model(), BLOCKS[:2, :12], CONFIG, EFFORT)

    def test_a_head_without_variance_is_a_marked_row(self, tmp_path: Path) -> None:
        model = _model()
        model.model.layers[1].self_attn.k_proj.weight.data[:8] = 0
        found = diagnose(model, BLOCKS, CONFIG, EFFORT)
        problems = {(r["layer"], r["head"]): r["problem"] for r in found["rows"] if r["problem"]}
        assert list(problems) == [(1, 0)] and "no variance" in problems[1, 0]
        write_diagnosis(json.loads(json.dumps(_record(found))), tmp_path)

    def test_nan_marks_the_layers_from_there_on(self, tmp_path: Path) -> None:
        model = _model()
        model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
        found = diagnose(model, BLOCKS, CONFIG, EFFORT)
        assert [r["layer"] for r in found["rows"] if r["problem"] is None] == [0, 0]
        assert any("layer 1" in problem for problem in found["problems"])
        console = Console(record=True, width=100)
        print_diagnosis(_record(found), console)
        assert "not measured" in console.export_text()

    def test_nothing_can_be_measured(self, tmp_path: Path) -> None:
        model = _model()
        model.model.embed_tokens.weight.data.fill_(float("nan"))
        found = diagnose(model, BLOCKS, CONFIG, EFFORT)
        assert all(r["problem"] for r in found["rows"])
        assert "Not measured" in write_diagnosis(json.loads(json.dumps(_record(found))), tmp_path).read_text()
