"""The frontier on a tiny model: every row measured, softmax put back, an interrupted run goes on, failures are told."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.families import FAMILIES, tiny
from rich.console import Console
from torch import Tensor

from darkformer import ConfigError, DarkConfig, InputError, convert
from darkformer.calibration.calibrate import calibrate
from darkformer.cost import kv_cache_bytes, layer_bytes
from darkformer.evaluation import frontier
from darkformer.evaluation.frontier import (
    FrontierRow,
    FrontierSettings,
    measure_frontier,
    sequence_bytes,
    sharing_weights,
)
from darkformer.evaluation.frontier_report import frontier_cells, frontier_markdown, frontier_notes, frontier_table
from darkformer.evaluation.recall import RecallTask
from darkformer.hf.cache import cache_bytes
from darkformer.hf.load import load_model, load_tokenizer
from darkformer.plots import quality_against_bytes

FORM = DarkConfig(num_features=16, window=8, sinks=2)
ROWS = (
    FrontierRow("softmax", "softmax", None),
    FrontierRow("local", "window and sinks", DarkConfig(method="local", window=8, sinks=2)),
    FrontierRow("budget-0", "constant state", FORM, "0 %"),
    FrontierRow("budget-50", "one layer exact", replace(FORM, keep_exact=(1,)), "50 %"),
)
SETTINGS = FrontierSettings(
    dtype="float32", lengths=(256, 512), recall=RecallTask((150, 200), trials=2, numbers=2, batch_size=1), prefill=96,
    repeats=2, batches=(1, 3), new_tokens=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    ids = torch.randint(3, 300, (4, 96), generator=torch.Generator().manual_seed(1))
    ids[:, 1::2] = ids[:1, :1]  # a token that even random weights predict now and then
    return ids


def measured(model: Any, tokenizer: Any, blocks: Tensor, folder: Path, **options: Any) -> dict[str, Any]:
    rows = options.pop("rows", ROWS)
    options = {"settings": SETTINGS, "calibrate": lambda model: calibrate(model, blocks.split(2)), **options}
    return measure_frontier(model, tokenizer, rows, blocks, folder, **options)


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, tokenizer: Any, blocks: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder, model = tmp_path_factory.mktemp("frontier"), load_model(str(model_folder))
    before = model(blocks).logits
    record = measured(model, tokenizer, blocks, folder)
    assert torch.equal(model(blocks).logits, before)  # softmax again
    return folder, record


def test_the_record(finished: tuple[Path, dict[str, Any]], blocks: Tensor) -> None:
    folder, record = finished
    assert record == json.loads((folder / "frontier.json").read_text())
    assert [row["name"] for row in record["rows"]] == [row.name for row in ROWS]
    assert record["context"] == 96 and record["environment"]["versions"]["torch"] == torch.__version__
    for row in record["rows"]:
        assert row["error"] is None
        assert row["score"]["tokens"] == 4 * 95 and len(row["score"]["by_position"]) == 2
        assert [point["distance"] for point in row["recall"]] == [150, 200]
        assert [point["batch"] for point in row["generation"]] == [1, 3]
        assert len(row["prefill"]["turns"]) == 2 and row["prefill"]["tokens"] == 96
        assert (row["calibration"] is None) == (row["config"] is None)
    losses = [row["score"]["loss"] for row in record["rows"]]
    assert len(set(losses)) == len(losses)  # each row computed its own attention


def test_bytes_are_those_of_the_real_cache(model_folder: Path, blocks: Tensor) -> None:
    for row in ROWS:
        model = load_model(str(model_folder))
        if row.config is not None:
            convert(model, row.config)
        cache = model(blocks[:1], use_cache=True).past_key_values
        own, softmax = sequence_bytes(model, 96, element_bytes=4)
        assert own == cache_bytes(cache), row.name
        assert softmax == 2 * kv_cache_bytes(96, num_kv_heads=2, head_dim=8)


def test_bytes_of_the_rows(finished: tuple[Path, dict[str, Any]]) -> None:
    shape = {"num_kv_heads": 2, "head_dim": 8, "element_bytes": 4}
    for row, asked in zip(finished[1]["rows"], ROWS, strict=True):
        for length in SETTINGS.lengths:
            cache = 2 * kv_cache_bytes(length, **shape)
            assert row["kv_cache_bytes"][str(length)] == cache
            own = cache if asked.config is None else sum(layer_bytes(asked.config, i, length, **shape) for i in (0, 1))
            assert row["bytes"][str(length)] == own
        after = [point["cache_bytes"] for point in row["generation"]]
        if asked.name in ("local", "budget-0"):
            assert after[0] == row["bytes"]["256"] and after[1] == 3 * after[0]


def test_sliding_layers_keep_their_window() -> None:
    model = tiny("gemma3") if "gemma3" in FAMILIES else pytest.skip("no such family")
    config = model.config.get_text_config()
    kinds, window = config.layer_types, config.sliding_window
    assert "sliding_attention" in kinds and "full_attention" in kinds
    shape = {"num_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "element_bytes": 2}
    long = 100 * window
    sliding = kinds.count("sliding_attention") * kv_cache_bytes(window, **shape)
    full = kinds.count("full_attention") * kv_cache_bytes(long, **shape)
    assert sequence_bytes(model, long, element_bytes=2) == (sliding + full, sliding + full)
    convert(model, FORM)
    state = layer_bytes(FORM, 0, long, **shape) * kinds.count("full_attention")
    assert sequence_bytes(model, long, element_bytes=2) == (sliding + state, sliding + full)


def test_what_is_done_is_not_measured_again(
    finished: tuple[Path, dict[str, Any]], model_folder: Path, tokenizer: Any, blocks: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, real, calls = load_model(str(model_folder)), frontier.evaluate, []

    def evaluating(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(frontier, "evaluate", evaluating)
    with pytest.raises(KeyboardInterrupt):
        measured(model, tokenizer, blocks, tmp_path)
    assert sorted(file.stem for file in (tmp_path / "stages").iterdir()) == ["local", "softmax"]
    record = measured(model, tokenizer, blocks, tmp_path)  # the interrupt has put softmax back
    assert len(calls) == 5
    for row, expected in zip(record["rows"], finished[1]["rows"], strict=True):
        assert row["score"]["loss"] == pytest.approx(expected["score"]["loss"], rel=1e-6)
    again = measured(model, tokenizer, blocks, tmp_path)
    assert len(calls) == 5 and again["rows"] == record["rows"]
    measured(model, tokenizer, blocks + 1, tmp_path)  # another text: nothing of it is done
    assert len(calls) == 9


def test_a_row_that_fails_says_so_and_the_others_go_on(
    model_folder: Path, tokenizer: Any, blocks: Tensor, tmp_path: Path
) -> None:
    def failing(model: Any) -> None:
        if model.config.darkformer["window"] == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a long trace")

    rows = (
        ROWS[0], FrontierRow("memory", "too large", DarkConfig(window=5)),
        FrontierRow("absent", "no such layer", DarkConfig(keep_exact=(9,))), ROWS[1],
    )  # fmt: skip
    model = load_model(str(model_folder))
    record = measured(model, tokenizer, blocks, tmp_path, rows=rows, calibrate=failing)
    errors = [row["error"] for row in record["rows"]]
    assert errors[0] is errors[3] is None and record["rows"][3]["prefill"]["median"] > 0
    assert errors[1] == "RuntimeError: DefaultCPUAllocator: can't allocate memory"
    assert "keep_exact names layer 9" in errors[2]
    notes = frontier_notes(record)
    assert f"too large failed: {errors[1]}" in notes and len(notes) == 4
    assert not (tmp_path / "stages" / "memory.json").exists()
    quality_against_bytes(record, tmp_path / "plot.png")
    columns, cells = frontier_cells(record)
    assert all(len(row) == len(columns) for row in cells) and set(cells[1][1:]) == {""}


def test_a_row_that_fails_in_the_timing_keeps_its_scores(
    model_folder: Path, tokenizer: Any, blocks: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = frontier._prefill

    def failing(model: Any, prompt: Tensor) -> Any:
        if getattr(model.config, "darkformer", {}).get("method") == "local" and prompt.shape[1] == 96:
            raise MemoryError("no memory")
        return real(model, prompt)

    monkeypatch.setattr(frontier, "_prefill", failing)
    model = load_model(str(model_folder))
    record = measured(model, tokenizer, blocks, tmp_path, rows=ROWS[:3])
    assert [row["error"] for row in record["rows"]] == [None, "MemoryError: no memory", None]
    assert "prefill" not in record["rows"][1] and record["rows"][1]["score"]["loss"] > 0
    assert "prefill" in record["rows"][2]
    monkeypatch.setattr(frontier, "_prefill", real)
    again = measured(model, tokenizer, blocks, tmp_path, rows=ROWS[:3])
    assert [row["error"] for row in again["rows"]] == [None, None, None] and "prefill" in again["rows"][1]


def test_table_and_picture_are_the_record(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, record = finished
    columns, cells = frontier_cells(record)
    assert columns == [
        "attention", "loss at 96", "acc.", "of softmax", "recall at 150", "recall at 200", "MB at 256", "MB at 512",
        "of cache at 256", "prefill 96, s", "tokens/s × 1", "tokens/s × 3",
    ]  # fmt: skip
    assert cells[0][3] == "100.0%" and cells[2][1] == f"{record['rows'][2]['score']['loss']:.3f}"
    markdown = frontier_markdown(record).splitlines()
    assert len(markdown) == 2 + len(ROWS) and markdown[4] == f"| {' | '.join(cells[2])} |"
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(frontier_table(record))
    shown = console.export_text()
    assert all(row.title in shown for row in ROWS)
    assert quality_against_bytes(record, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    without = json.loads(json.dumps(record))
    without["settings"] |= {"recall": None, "prefill": 0}
    for row in without["rows"]:
        del row["recall"], row["prefill"], row["generation"]
    quality_against_bytes(without, tmp_path / "b.png")
    assert all(len(row) == 7 for row in frontier_cells(without)[1])


def test_copies_share_their_weights(model_folder: Path, blocks: Tensor) -> None:
    model = load_model(str(model_folder))
    other = convert(sharing_weights(model), FORM)
    own = {x.data_ptr() for x in model.parameters()}
    assert {x.data_ptr() for name, x in other.named_parameters() if ".dark." not in name} == own
    assert not any(hasattr(module, "dark") for module in model.modules())
    reference = convert(load_model(str(model_folder)), FORM)
    assert torch.equal(other(blocks).logits, reference(blocks).logits)


def test_refusals(model_folder: Path, tokenizer: Any, blocks: Tensor, tmp_path: Path) -> None:
    model = load_model(str(model_folder))
    with pytest.raises(InputError, match="each with its own name"):
        measured(model, tokenizer, blocks, tmp_path, rows=(ROWS[0], ROWS[0]))
    with pytest.raises(InputError, match="one block at least"):
        measured(model, tokenizer, blocks[:0], tmp_path)
    with pytest.raises(InputError, match="starts from softmax"):
        measured(convert(model, FORM), tokenizer, blocks, tmp_path)
    with pytest.raises(ConfigError, match="names a file"):
        FrontierRow("a/b", "", None)
    with pytest.raises(ConfigError, match="at least 1"):
        FrontierSettings(batches=(0,))
    assert not list(tmp_path.iterdir())
