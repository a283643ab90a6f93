"""The command line on a tiny model and real text: every verb, its help, its refusals."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import darkformer
from darkformer.cli import app, main
from darkformer.config import DarkConfig, TrainConfig
from darkformer.errors import ConfigError
from darkformer.train.finetune import Interrupted

SMALL = [
    "--seq-len",
    "64",
    "--context",
    "64",
    "--batch-size",
    "2",
    "--features",
    "16",
    "--window",
    "8",
    "--dtype",
    "float32",
]


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def linearized(model_folder: Path, text_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run("linearize", str(model_folder), "--out", str(out), "--data", text_glob, "--steps", "3", *SMALL)
    return out


def test_linearize_writes_a_model_and_a_true_record(linearized: Path, text_glob: str) -> None:
    record = json.loads((linearized / "record.json").read_text())
    assert record["config"]["num_features"] == 16 and record["budget"]["steps"] == 3
    assert len(record["losses"]) == 3 and len(record["calibration"]) == 2
    assert set(record["scores"]) == {"softmax", "converted", "finetuned"}
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert not (linearized / "checkpoints").exists()
    assert f"{record['scores']['finetuned']['loss']:.4f}" in (linearized / "model" / "README.md").read_text()
    model = darkformer.load_model(str(linearized / "model"))
    layers = list(darkformer.dark_layers(model))
    assert [fm.config.window for fm in layers] == [8, 8]
    # The saved model really scores what the record says.
    from darkformer.hf.load import load_tokenizer
    from darkformer.train.evaluate import evaluate
    from darkformer.train.linearize import EVALUATION_TOKENS, load_context_text

    _, blocks = load_context_text([text_glob], (), load_tokenizer(str(linearized / "model")), 64)
    score = evaluate(model, blocks[: EVALUATION_TOKENS // 64])
    assert score.loss == pytest.approx(record["scores"]["finetuned"]["loss"], rel=1e-5)


def test_a_finished_run_is_shown_again_and_another_one_is_refused(
    linearized: Path, model_folder: Path, text_glob: str
) -> None:
    words = ["linearize", str(model_folder), "--out", str(linearized), "--data", text_glob, *SMALL]
    before = (linearized / "record.json").stat().st_mtime_ns
    assert "finished" in run(*words, "--steps", "3", "--resume")
    assert (linearized / "record.json").stat().st_mtime_ns == before
    for extra, message in ((["--steps", "3"], "holds a run"), (["--steps", "4", "--resume"], "steps")):
        with pytest.raises(darkformer.RunFolderError, match=message):
            CliRunner().invoke(app, [*words, *extra], catch_exceptions=False)


def test_a_folder_of_something_else_is_never_touched(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for flags in ([], ["--overwrite"], ["--resume"]):
        with pytest.raises(darkformer.RunFolderError, match="holds no run"):
            words = ["linearize", str(model_folder), "--out", str(tmp_path), "--data", text_glob, *SMALL, *flags]
            CliRunner().invoke(app, words, catch_exceptions=False)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_converted_model_is_not_converted_again(linearized: Path, text_glob: str, tmp_path: Path) -> None:
    for model, message in ((linearized / "model", "is converted already"), (linearized, "Its run's model is in")):
        words = ["linearize", str(model), "--out", str(tmp_path / "r"), "--data", text_glob, *SMALL]
        with pytest.raises(darkformer.InputError, match=message):
            CliRunner().invoke(app, words, catch_exceptions=False)


def test_overwrite_starts_afresh(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    words = ["linearize", str(model_folder), "--out", str(tmp_path / "r"), "--data", text_glob, *SMALL]
    run(*words, "--steps", "1", "--train", "none")
    output = run(*words, "--steps", "1", "--paper", "--overwrite")
    assert "Not used beside --paper: window=8 (the paper's: 0)" in " ".join(output.split())
    record = json.loads((tmp_path / "r" / "record.json").read_text())
    assert record["config"] == DarkConfig.paper(16).to_dict()


def test_evaluate_accepts_a_run_folder_and_compares(
    linearized: Path, model_folder: Path, text_glob: str, tmp_path: Path
) -> None:
    words = ("--data", text_glob, "--context", "64", "--dtype", "float32", "--out", str(tmp_path))
    output = run("evaluate", str(linearized), "--against", str(model_folder), *words)
    losses = json.loads((linearized / "record.json").read_text())["scores"]
    assert f"{losses['finetuned']['loss']:.4f}" in output and f"{losses['softmax']['loss']:.4f}" in output


def test_evaluate_scores_by_position_at_the_context(model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    words = ("--data", text_glob, "--dtype", "float32", "--max-tokens", "1", "--out", str(tmp_path))
    output = run("evaluate", str(model_folder), "--context", "300", *words)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["context"] == 300 and record["data"] == [text_glob]
    (row,) = record["models"].values()
    buckets = row["text"]["by_position"]
    assert [(b["start"], b["stop"]) for b in buckets] == [(1, 64), (64, 128), (128, 256), (256, 300)]
    assert row["text"]["tokens"] == 299 and row["window"] is None
    assert "256-299" in output and f"{buckets[-1]['loss']:.4f}" in output
    assert (tmp_path / "loss-by-position.png").read_bytes().startswith(b"\x89PNG")
    run("evaluate", str(model_folder), "--seq-len", "300", *words)  # the name it had before
    assert json.loads((tmp_path / "evaluation.json").read_text())["context"] == 300


def test_evaluate_refuses_text_shorter_than_the_context(model_folder: Path, tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("one two three " * (i + 1))
    words = ["evaluate", str(model_folder), "--data", str(tmp_path / "*.txt"), "--out", str(tmp_path / "out")]
    expected = {
        (): r"held-out text has \d+ tokens, one sequence needs 2048: give more text, --whole to score all of --data",
        ("--whole",): r"the text has \d+ tokens, one sequence needs 2048: give more text or a smaller --context",
    }
    for more, message in expected.items():
        with pytest.raises(darkformer.InputError, match=message):
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_generate_streams_and_reports_its_state(linearized: Path) -> None:
    output = run("generate", str(linearized), "--prompt", "The with statement", "--max-new-tokens", "7")
    assert "The with statement" in output and "7 tokens" in output and "MB" in output
    again = [
        run("generate", str(linearized), "--prompt", "An object", "--temperature", "1", "--seed", s) for s in "112"
    ]
    text = [o.rsplit("tokens,", 1)[0] for o in again]
    assert text[0] == text[1] != text[2]


def test_every_help_is_the_fields_help() -> None:
    def squeezed(text: str) -> str:
        return "".join(c for c in text if c.isalnum())

    shown = squeezed(run("linearize", "--help"))
    for config in (DarkConfig, TrainConfig):
        for f in dataclasses.fields(config):
            assert squeezed(f.metadata["help"])[:60] in shown, f.name


def test_the_version_is_the_packages() -> None:
    assert run("--version") == f"darkformer {darkformer.__version__}\n"


def test_an_error_is_one_line_and_exit_code_one(tmp_path: Path) -> None:
    words = ["linearize", "missing.gguf", "--out", str(tmp_path / "a")]
    done = subprocess.run([sys.executable, "-m", "darkformer.cli", *words], capture_output=True, text=True)
    assert done.returncode == 1 and "no such GGUF file" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"), [("--method", "magic", "method='magic'"), ("--window", "-1", "window=-1")]
)
def test_settings_are_checked_before_anything_starts(
    option: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    words = ["darkformer", "linearize", "x.gguf", "--out", str(tmp_path / "a"), option, value]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        main()
    shown = capfd.readouterr().err
    assert caught.value.code == 1 and message in shown and "Traceback" not in shown
    assert not (tmp_path / "a").exists()


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise Interrupted("interrupted at step 3 of 9")

    monkeypatch.setattr("darkformer.train.linearize.linearize", interrupted)
    monkeypatch.setattr(sys, "argv", ["darkformer", "linearize", "x", "--out", str(tmp_path / "r")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    shown = capfd.readouterr().err
    assert "interrupted at step 3 of 9" in shown and "--resume" in shown


def test_messages_with_brackets_are_shown_whole(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise darkformer.MissingExtraError("pip install 'darkformer[train]' [/b]")

    monkeypatch.setattr("darkformer.train.linearize.linearize", failing)
    monkeypatch.setattr(sys, "argv", ["darkformer", "linearize", "x", "--out", "r"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "darkformer[train]' [/b]" in capfd.readouterr().err


def test_resume_of_an_interrupted_run_gives_the_uninterrupted_record(
    model_folder: Path, text_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darkformer.train import linearize as module

    words = ["linearize", str(model_folder), "--data", text_glob, "--steps", "4", *SMALL]
    run(*words, "--out", str(tmp_path / "whole"))
    real = module.trained

    def dying(*args: object, **kwargs: object) -> list[float]:
        real(*args, **kwargs)  # type: ignore[arg-type]
        raise MemoryError

    monkeypatch.setattr(module, "trained", dying)
    cut = [*words, "--save-every", "2", "--out", str(tmp_path / "cut")]
    with pytest.raises(MemoryError):
        CliRunner().invoke(app, cut, catch_exceptions=False)
    monkeypatch.setattr(module, "trained", real)
    run(*cut, "--resume")
    whole, again = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("whole", "cut"))
    assert again["losses"] == pytest.approx(whole["losses"], rel=1e-6) and len(again["losses"]) == 4
    for name in whole["scores"]:
        assert again["scores"][name]["loss"] == pytest.approx(whole["scores"][name]["loss"], rel=1e-6)


def test_a_run_of_all_stages_goes_on_after_transfer(
    model_folder: Path, text_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darkformer.train import linearize as module

    words = ["linearize", str(model_folder), "--data", text_glob, "--transfer-steps", "4", "--steps", "2", *SMALL]
    words += ["--distill", "0.5", "--window-dropout", "0.5"]
    run(*words, "--out", str(tmp_path / "whole"))

    def killed(*args: object, **kwargs: object) -> None:
        raise MemoryError

    cut = [*words, "--out", str(tmp_path / "cut")]
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(module, "finetune", killed)
        CliRunner().invoke(app, cut, catch_exceptions=False)
    after_transfer = tmp_path / "cut" / "checkpoints" / "transferred"
    run("evaluate", str(after_transfer), "--data", text_glob, "--context", "64", "--out", str(tmp_path / "scores"))
    with monkeypatch.context() as patched:
        patched.setattr(module, "transfer", killed)  # it is not done again
        run(*cut, "--resume")
    whole, again = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("whole", "cut"))
    assert list(whole["scores"]) == ["softmax", "converted", "transferred", "finetuned"]
    assert [layer["layer"] for layer in whole["transfer"]] == [0, 1]
    for name in whole["scores"]:
        assert again["scores"][name]["loss"] == pytest.approx(whole["scores"][name]["loss"], rel=1e-6)
    assert again["transfer"] == whole["transfer"] and not (tmp_path / "cut" / "checkpoints").exists()


def test_what_is_done_before_an_interruption_is_not_done_again(
    model_folder: Path, text_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darkformer.train import linearize as module

    words = ["linearize", str(model_folder), "--data", text_glob, "--transfer-steps", "2", "--steps", "2", *SMALL]
    run(*words, "--out", str(tmp_path / "whole"))

    def killed(*args: object, **kwargs: object) -> None:
        raise MemoryError

    cut = [*words, "--out", str(tmp_path / "cut")]
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(module, "transfer", killed)  # before its first checkpoint
        CliRunner().invoke(app, cut, catch_exceptions=False)
    titles: list[str] = []
    real = module.scored

    def scored(*args: Any) -> dict[str, Any]:
        titles.append(args[-1])
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(module, "calibrate", killed)
        patched.setattr(module, "scored", scored)
        run(*cut, "--resume")
    assert titles == ["transferred", "finetuned"]
    whole, again = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("whole", "cut"))
    assert list(again["scores"]) == ["softmax", "converted", "transferred", "finetuned"]
    for name in whole["scores"]:
        assert again["scores"][name]["loss"] == pytest.approx(whole["scores"][name]["loss"], rel=1e-6)
    assert again["calibration"] == whole["calibration"]


def test_a_budget_in_the_record_is_what_the_saved_model_keeps(
    model_folder: Path, text_glob: str, tmp_path: Path
) -> None:
    from darkformer.calibration.budget import converted_bytes
    from darkformer.hf.load import load_model

    words = ["linearize", str(model_folder), "--data", text_glob, "--steps", "0", "--no-frontier", "--context", "300"]
    words += ["--features", "8", "--dtype", "float32", "--seq-len", "64"]
    for name, extra in (("off", []), ("on", ["--keep-features"])):
        said = run(*words, "--budget", "60%", *extra, "--out", str(tmp_path / name))
        assert said.count("counted at 4 bytes a number (float32)") == 2  # what is chosen, and what calibration leaves
        record = json.loads((tmp_path / name / "record.json").read_text())
        choice = record["choice"]
        assert record["kept_bytes"] == converted_bytes(load_model(str(tmp_path / name / "model")), choice["length"], 4)
        assert record["kept_bytes"] <= int(0.6 * choice["softmax"])


@pytest.mark.parametrize("words", [["--layer-window", "1=64"], ["--keep-exact", "1"], ["--method", "exact"]])
def test_what_a_budget_chooses_is_not_given_beside_it(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{words[0]}.* beside --budget"):
        CliRunner().invoke(
            app, ["linearize", "x", "--budget", "10%", *words, "--out", str(tmp_path)], catch_exceptions=False
        )
