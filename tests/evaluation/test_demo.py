"""The demo on a tiny model: its table, its files, and that an interrupted one continues to the same result."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from darkformer import ConfigError, DarkConfig, RunFolderError, TrainConfig
from darkformer.calibration.budget import Choice
from darkformer.cli import app
from darkformer.console import RichReporter
from darkformer.evaluation import demo
from darkformer.evaluation.demo import Demo
from darkformer.evaluation.demo_report import notes, print_demo, write_report
from darkformer.evaluation.frontier_report import frontier_cells
from darkformer.evaluation.recall import RecallTask
from darkformer.evaluation.settings import DemoConfig, FrontierSettings
from darkformer.hf.load import load_model
from darkformer.records import finish_run
from darkformer.train.finetune import Interrupted

NAMES = ["softmax", "local", "constant", "budget"]
SMALL = FrontierSettings(
    lengths=(256, 512), recall=RecallTask((150, 200), trials=2, numbers=2, batch_size=1), prefill=64, repeats=2,
    batches=(1, 2), new_tokens=2,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def chosen() -> Any:
    """A choice of heads that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        stub = lambda *args, **_: (  # noqa: E731
            None, [("0", Choice(args[4], 1, 2, 3)), ("40%", Choice(replace(args[4], keep_exact=(1,)), 1, 2, 3))],
        )  # fmt: skip
        patch.setattr(demo, "measured_choices", stub)
        yield


def make(model_folder: Path, text_glob: str, out: Path, **budget: Any) -> Demo:
    settings = DemoConfig(str(model_folder), (text_glob,), 64, "40%", 512, "The with statement", new_tokens=8)
    default = DarkConfig(num_features=16, window=8, sinks=2)
    train = TrainConfig(**{"steps": 0, "seq_len": 64, "batch_size": 2, "dtype": "float32", **budget})
    return Demo(settings, default, train, out, RichReporter(Console(quiet=True)), SMALL)


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, text_glob: str, tmp_path_factory: pytest.TempPathFactory, chosen: None
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, make(model_folder, text_glob, out, steps=4).run()


def test_record_and_files(finished: tuple[Path, dict[str, Any]]) -> None:
    out, record = finished
    assert [row["name"] for row in record["rows"]] == [*NAMES, "trained"]
    assert record == json.loads((out / "record.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert all(row["error"] is None for row in rows.values())
    assert rows["budget"]["config"]["keep_exact"] == [1] and rows["constant"]["config"]["keep_exact"] == []
    assert rows["trained"]["score"]["loss"] < rows["budget"]["score"]["loss"]  # it did learn
    assert len(rows["trained"]["losses"]) == 4
    for name in ("bytes", "prefill", "generation"):
        assert rows["trained"][name] == rows["budget"][name]
    for name in ("frontier", "positions", "error"):
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "{{" not in page
    assert load_model(str(out / "model")).config.darkformer["keep_exact"] == [1]
    assert not (out / "checkpoints").exists()


def test_without_steps_nothing_trains(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    record = make(model_folder, text_glob, tmp_path / "r").run()
    assert [row["name"] for row in record["rows"]] == NAMES
    assert load_model(str(tmp_path / "r" / "model")).config.darkformer["keep_exact"] == [1]
    assert "Nothing is trained." in " ".join(notes(record))


def test_table_is_the_record(finished: tuple[Path, dict[str, Any]]) -> None:
    _, record = finished
    _, rows = frontier_cells(record)
    assert len(rows) == 5 and rows[0][1] == f"{record['rows'][0]['score']['loss']:.3f}"
    assert all(all(row) for row in rows)  # every cell was measured
    console = Console(record=True, width=220, file=io.StringIO())
    print_demo(record, console)
    text = console.export_text()
    assert all(row["title"] in text for row in record["rows"]) and text.count("The with statement") == 2


def test_generated_brackets_are_text_not_markup(finished: tuple[Path, dict[str, Any]]) -> None:
    record = json.loads(json.dumps(finished[1]))
    for row in record["rows"]:
        if "continued" in row:
            row["continued"]["text"] = " x[i] = [/b] expr[slice]"
    console = Console(record=True, width=220, file=io.StringIO())
    print_demo(record, console)
    assert console.export_text().count("x[i] = [/b] expr[slice]") == 2


def test_names_and_generated_text_are_written_out(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    record = json.loads(json.dumps(finished[1])) | {"model": "<i>\x1b[31m\ud800"}
    for row in record["rows"]:
        row["title"] += " $\\frac$ \x9b"
        if "continued" in row:
            row["continued"] |= {"prompt": "</pre>\u202e", "text": "\x1b]0;title\x07"}
    console = Console(record=True, width=220, file=io.StringIO())
    print_demo(record, console)
    page = write_report(record, tmp_path).read_text(encoding="utf-8")
    for shown in (console.export_text(), page):
        assert r"\x1b[31m\ud800" in shown and r"\u202e" in shown and r"\x1b]0;title\x07" in shown
        assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert "<i>" not in page and "&lt;/pre&gt;" in page


def test_a_finished_demo_shows_its_record(
    finished: tuple[Path, dict[str, Any]], model_folder: Path, text_glob: str
) -> None:
    out, record = finished
    before = (out / "record.json").stat().st_mtime_ns
    assert make(model_folder, text_glob, out, steps=4).run() == record
    assert (out / "record.json").stat().st_mtime_ns == before


def test_its_record_is_a_recipe_of_the_same_run(
    finished: tuple[Path, dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    words = ["demo", "--config", str(out / "record.json"), "--model", str(model_folder), "--out", str(out)]
    with pytest.raises(ConfigError, match="config: window: darkformer demo has no such option"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    for name in ("record.json", "run.json"):  # as if the command line had made it
        text = (out / name).read_text()
        (out / name).write_text(text.replace('"window": 8', '"window": 64'))
    with pytest.raises(RunFolderError, match=r"record\.json: it was altered after the run"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    finish_run(out, json.loads((out / "run.json").read_text())["settings"])
    result = CliRunner().invoke(app, words, catch_exceptions=False)  # with other settings the folder is refused
    assert result.exit_code == 0 and "holds this run, finished" in " ".join(result.stderr.split())


def test_what_a_budget_chooses_is_not_given(model_folder: Path, tmp_path: Path) -> None:
    quiet = RichReporter(Console(quiet=True))
    for config in (DarkConfig(method="exact"), DarkConfig(keep_exact=(1,)), DarkConfig(layer_windows=((1, 64),))):
        with pytest.raises(ConfigError, match="beside --budget"):
            Demo(DemoConfig(str(model_folder)), config, TrainConfig(), tmp_path, quiet)


@pytest.mark.parametrize("at", [1, 3], ids=["first step", "step before the last"])
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
        if calls == at and logs and "loss" in logs:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, args, state, control, logs, **kwargs)

    monkeypatch.setattr(finetune._Steps, "on_log", interrupting)
    with pytest.raises(Interrupted):
        make(model_folder, text_glob, tmp_path / "r", steps=4).run()
    assert {p.stem for p in (tmp_path / "r" / "stages").iterdir()} == {*NAMES, "chosen", "speed"}
    assert not json.loads((tmp_path / "r" / "run.json").read_text())["finished"]
    again = make(model_folder, text_glob, tmp_path / "r", steps=4).run()
    for row, expected in zip(again["rows"], finished[1]["rows"], strict=True):
        assert row["score"]["loss"] == pytest.approx(expected["score"]["loss"], rel=1e-5), row["name"]


@pytest.mark.parametrize(("budget", "message"), [("abc", "give a share of the softmax cache"), ("1%", "give at least")])
def test_budgets_that_are_none(
    budget: str, message: str, model_folder: Path, text_glob: str, tmp_path: Path, chosen: None
) -> None:
    settings = DemoConfig(str(model_folder), (text_glob,), 64, budget, 512)
    with pytest.raises(ConfigError, match=message):
        Demo(
            settings, DarkConfig(num_features=16, window=8), TrainConfig(steps=0), tmp_path / "r",
            RichReporter(Console(quiet=True)), SMALL,
        ).run()  # fmt: skip


def test_refusals(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="window=0"):
        Demo(DemoConfig(), DarkConfig(window=0), TrainConfig(), tmp_path, RichReporter(Console(quiet=True)))
