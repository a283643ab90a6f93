"""Budgets from the command line on a tiny model: the frontier, a model within a budget, a diagnosis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import darkformer
from darkformer.calibration.budget import kept_bytes
from darkformer.cli import app
from darkformer.evaluation.budget import PICTURE, RECORD, with_budget
from darkformer.hf.cache import cache_bytes
from darkformer.hf.layers import config_of

CONTEXT = "320"


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def frontier(model_folder: Path, text_glob: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("budget") / "run"
    words = [
        "budget", str(model_folder), "--out", str(out), "--data", text_glob, "--context", CONTEXT, "--budget", "0",
        "--budget", "40%", "--budget", "1%", "--budget-at", "3000", "--window", "16", "--features", "16",
        "--prefill", "96", "--batch", "2", "--trials", "2", "--eval-tokens", "640", "--dtype", "float32",
    ]  # fmt: skip
    run(*words)
    return out, words


def test_the_frontier(frontier: tuple[Path, list[str]]) -> None:
    out, _ = frontier
    record = json.loads((out / RECORD).read_text())
    assert [row["name"] for row in record["rows"]] == [
        "softmax",
        "window-16",
        "budget-0",
        "budget-40",
    ]  # 1% does not fit
    assert all(row["error"] is None for row in record["rows"])
    assert [choice["budget"] for choice in record["choices"]] == ["0", "40%"]
    budget = record["rows"][-1]
    assert budget["bytes"]["8192"] < budget["kv_cache_bytes"]["8192"]
    assert budget["config"]["keep_exact"] == record["choices"][1]["config"]["keep_exact"] != []
    assert len(record["sensitivity"]["order"]) == 4
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_it_goes_on_where_it_stopped(frontier: tuple[Path, list[str]]) -> None:
    out, words = frontier
    before = {file: file.stat().st_mtime_ns for file in (out / "stages").glob("*.json")}
    run(*words, "--resume")
    assert {file: file.stat().st_mtime_ns for file in (out / "stages").glob("*.json")} == before
    with pytest.raises(darkformer.RunFolderError, match="--resume continues it"):
        run(*words)


def test_its_record_is_a_recipe_of_the_same_run(frontier: tuple[Path, list[str]]) -> None:
    out, words = frontier
    before = {file: file.stat().st_mtime_ns for file in (out / "stages").glob("*.json")}
    run("budget", words[1], "--config", str(out / RECORD), "--out", str(out), "--resume")  # another one is refused
    assert {file: file.stat().st_mtime_ns for file in (out / "stages").glob("*.json")} == before


def test_the_frontier_of_linearize_has_its_budget(model_folder: Path) -> None:
    model = darkformer.load_model(str(model_folder))
    softmax = kept_bytes(model, None, 4096, 4)
    assert with_budget(("0", "5%", "50%"), "20%", model, 4096, "float32") == ("0", "5%", "20%", "50%")
    assert with_budget(("0", "5%", "50%"), "5 %", model, 4096, "float32") == ("0", "5%", "50%")
    size = f"{softmax // 4}B"
    assert with_budget(("0", "5%", "40%"), size, model, 4096, "float32") == ("0", "5%", size, "40%")
    assert with_budget(("0", "5%", "40%"), size, model, 4096, "bfloat16") == ("0", "5%", "40%", size)


def test_linearize_within_a_budget(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    words = [
        "linearize", str(model_folder), "--data", text_glob, "--context", CONTEXT, "--features", "16",
        "--seq-len", "64", "--batch-size", "2", "--dtype", "float32", "--budget", "40%", "--budget-at", "3000",
    ]  # fmt: skip
    run(*words, "--steps", "0", "--no-frontier", "--out", str(tmp_path / "untrained"))
    record = json.loads((tmp_path / "untrained" / "record.json").read_text())
    kept = record["choice"]["config"]["keep_exact"]
    assert kept and record["memory"] == "40%"
    model = darkformer.load_model(str(tmp_path / "untrained" / "model"))
    assert config_of(model).to_dict() == record["converted_config"] and config_of(model).keep_exact == tuple(kept)
    with torch.no_grad():
        cache = model(torch.randint(1, 300, (1, 3000)), use_cache=True).past_key_values
    assert cache_bytes(cache) <= 0.4 * record["choice"]["softmax"] + 3 * 8  # counts of tokens beside
    card = (tmp_path / "untrained" / "model" / "README.md").read_text()
    assert "grow" in card and str(kept[0]) in card


@pytest.mark.parametrize(
    ("more", "budget", "reason"),
    [
        (["--context", CONTEXT], "10%", ""),
        (["--context", "64"], None, "no far field to choose heads by"),
        (["--context", CONTEXT, "--budget-at", "300"], None, "give at least that"),
        (["--context", CONTEXT, "--convert-sliding"], None, "layers that attend to everything"),
    ],
)
def test_the_usual_budget_where_it_is_possible(
    more: list[str], budget: str | None, reason: str, model_folder: Path, text_glob: str, tmp_path: Path
) -> None:
    words = [
        "linearize", str(model_folder), "--data", text_glob, "--features", "8", "--seq-len", "64", "--batch-size", "1",
        "--dtype", "float32", "--steps", "2", "--out", str(tmp_path / "r"), *more,
    ]  # fmt: skip
    said = " ".join(run(*words).split())
    record = json.loads((tmp_path / "r" / "record.json").read_text())
    assert (record["memory"], record["frontier"]) == (budget, None)
    assert ("No budget, as" in said) == (budget is None) and reason in said
    if budget:
        assert record["kept_bytes"] <= int(0.1 * record["choice"]["softmax"])
    else:
        assert config_of(darkformer.load_model(str(tmp_path / "r" / "model"))).window == 64
        with pytest.raises(darkformer.ConfigError, match=reason):
            run(*words, "--overwrite", "--budget", "10%")


def test_what_contradicts_a_budget(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    words = ["linearize", str(model_folder), "--data", text_glob, "--context", CONTEXT, "--out", str(tmp_path / "r")]
    for more, message in (
        (["--budget", "10%", "--paper"], "--paper with --budget"),
        (["--budget", "10%", "--keep-exact", "1.0"], "--keep-exact beside --budget"),
        (["--budget", "ten"], "give a share of the softmax cache"),
        (["--budget", "1%"], "give at least that"),
        (["--budget", "10%", "--context", "100000"], "give more text, or a smaller --context"),
        (["--keep-exact", "7.0"], "keep_exact names layer 7"),
        (["--keep-exact", "1.5"], "names key/value head 1.5"),
    ):
        with pytest.raises(darkformer.DarkformerError, match=message):
            run(*words, *more)
        assert not (tmp_path / "r").exists()  # before anything is measured


def test_a_diagnosis_names_the_heads(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    output = run(
        "diagnose", str(model_folder), "--out", str(tmp_path / "d"), "--data", text_glob, "--tokens", "64", "--context",
        CONTEXT, "--budget", "60%", "--features", "16", "--window", "8",
    )  # fmt: skip
    needs = json.loads((tmp_path / "d" / "record.json").read_text())["needs"]
    assert len(needs["sensitivity"]["rows"]) == 4
    shown = " ".join(output.split())
    assert "A budget of 60% at" in shown and needs["choice"]["config"]["keep_exact"]
    assert "linearize --budget 60%" in shown


def test_a_diagnosis_keeps_what_heads_need_without_a_budget(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    words = ["diagnose", str(model_folder), "--out", str(tmp_path / "d"), "--data", text_glob, "--tokens", "64"]
    words += ["--context", CONTEXT, "--features", "16", "--window", "8"]
    with pytest.raises(darkformer.ConfigError, match="give a share of the softmax cache"):
        run(*words, "--budget", "ten")
    assert not (tmp_path / "d").exists()
    shown = " ".join(run(*words, "--budget", "1%").split())
    needs = json.loads((tmp_path / "d" / "record.json").read_text())["needs"]
    assert len(needs["sensitivity"]["rows"]) == 4 and needs["choice"] is None
    assert "No heads were chosen: a budget of 1%" in shown
