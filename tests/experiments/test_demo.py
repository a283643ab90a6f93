"""The demo on a tiny model: its table, its files, and that an interrupted one continues to the same result."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from darkformer import DarkConfig, TrainConfig
from darkformer.cost import kv_cache_bytes, state_bytes
from darkformer.experiments.console import RichReporter
from darkformer.experiments.demo import Demo, DemoConfig
from darkformer.experiments.report import far_field_recovery, print_demo, table_rows
from darkformer.hf.load import load_model
from darkformer.train.finetune import Interrupted

NAMES = ["softmax", "performer", "dark-paper", "default", "exact-part", "features-only"]


def make(model_folder: Path, text_glob: str, out: Path, **budget: Any) -> Demo:
    settings = DemoConfig(str(model_folder), (text_glob,), 512, prompt="The with statement", new_tokens=8)
    default = DarkConfig(num_features=16, window=8, sinks=2)
    train = TrainConfig(steps=4, seq_len=64, batch_size=2, dtype="float32", **budget)
    return Demo(settings, default, train, out, RichReporter(Console(quiet=True)))


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, text_glob: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, make(model_folder, text_glob, out).run()


def test_record_and_files(finished: tuple[Path, dict[str, Any]]) -> None:
    out, record = finished
    assert [row["name"] for row in record["rows"]] == NAMES
    assert record == json.loads((out / "record.json").read_text())
    for row in record["rows"]:
        assert [point["step"] for point in row["curve"]] == [0, 2, 4]
        assert row["after"]["loss"] < row["before"]["loss"]  # it did learn
    for name in ("plots/accuracy.png", "plots/error.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "{{" not in page
    assert load_model(str(out / "model")).config.darkformer["window"] == 8
    assert not any((out / "checkpoints").iterdir())


def test_bytes_are_those_of_the_real_cache(finished: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["name"]: row for row in finished[1]["rows"]}
    shape = {"num_kv_heads": 2, "head_dim": 8}
    assert rows["default"]["generation"]["cache_bytes"] == rows["default"]["state_bytes"]
    assert rows["default"]["state_bytes"] == 2 * state_bytes(DarkConfig(num_features=16, window=8, sinks=2), **shape)
    seen = rows["softmax"]["generation"]["cache_bytes"] // (2 * kv_cache_bytes(1, **shape))
    assert rows["softmax"]["generation"]["cache_bytes"] == 2 * kv_cache_bytes(seen, **shape)
    assert rows["softmax"]["state_bytes"] == 2 * kv_cache_bytes(8192, **shape)


def test_table_is_the_record(finished: tuple[Path, dict[str, Any]]) -> None:
    _, record = finished
    rows = table_rows(record)
    assert len(rows) == 7 and rows[0][1] == f"{record['rows'][0]['before']['loss']:.3f}"
    loss = {row["name"]: row["after"]["loss"] for row in record["rows"]}
    recovery = (loss["exact-part"] - loss["default"]) / (loss["exact-part"] - loss["softmax"])
    assert far_field_recovery(record) == recovery
    console = Console(record=True, width=160, file=io.StringIO())
    print_demo(record, console)
    text = console.export_text()
    assert all(row["title"] in text for row in record["rows"][1:]) and "The with statement" in text


def test_generated_brackets_are_text_not_markup(finished: tuple[Path, dict[str, Any]]) -> None:
    record = json.loads(json.dumps(finished[1]))
    for row in record["rows"]:
        if "generation" in row:
            row["generation"]["text"] = " x[i] = [/b] expr[slice]"
    console = Console(record=True, width=160, file=io.StringIO())
    print_demo(record, console)
    assert console.export_text().count("x[i] = [/b] expr[slice]") == 2


def test_a_finished_demo_shows_its_record(
    finished: tuple[Path, dict[str, Any]], model_folder: Path, text_glob: str
) -> None:
    out, record = finished
    before = (out / "record.json").stat().st_mtime_ns
    assert make(model_folder, text_glob, out).run() == record
    assert (out / "record.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("at", [5, 7], ids=["first step", "step before the last"])
def test_interrupt_and_rerun_end_as_an_uninterrupted_run(
    finished: tuple[Path, dict[str, Any]], model_folder: Path, text_glob: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, at: int,
) -> None:  # fmt: skip
    from darkformer.train import finetune

    calls = 0
    log = finetune._Steps.on_log

    def interrupting(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        nonlocal calls
        calls += bool(logs and "loss" in logs)
        if calls == at and logs and "loss" in logs:  # four steps a variant: this is in the second one
            os.kill(os.getpid(), signal.SIGINT)
        log(self, args, state, control, logs, **kwargs)

    monkeypatch.setattr(finetune._Steps, "on_log", interrupting)
    with pytest.raises(Interrupted):
        make(model_folder, text_glob, tmp_path / "r").run()
    assert [p.stem for p in (tmp_path / "r" / "stages").iterdir()] == ["softmax"]
    assert not json.loads((tmp_path / "r" / "run.json").read_text())["finished"]
    again = make(model_folder, text_glob, tmp_path / "r").run()
    for row, expected in zip(again["rows"], finished[1]["rows"], strict=True):
        assert [p["step"] for p in row["curve"]] == [0, 2, 4]
        for point, other in zip(row["curve"], expected["curve"], strict=True):
            assert point["loss"] == pytest.approx(other["loss"], rel=1e-5), row["name"]
