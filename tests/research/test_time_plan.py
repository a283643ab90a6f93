"""`darkformer plan` and `darkformer reproduce time` from end to end, on small budgets: calibration, plans, the study,
kills, bad input."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from darkformer import ConfigError, DarkConfig, InputError, RunFolderError, TrainConfig
from darkformer.cli import app
from darkformer.console import RichReporter
from darkformer.hf.load import load_config
from darkformer.ops.native.build import cache_folder
from darkformer.reporting import Silent
from darkformer.research.time import study as study_module
from darkformer.research.time.analysis import analyse
from darkformer.research.time.calibration import (
    Calibration,
    Trial,
    calibrate_machine,
    calibration_file,
    load_calibration,
    trials,
)
from darkformer.research.time.estimate import Estimate, budget_config, crossover, estimate
from darkformer.research.time.report import command_of, estimate_lines, study_tables, write_study
from darkformer.research.time.settings import PlanTask, count
from darkformer.research.time.shape import Shape, llama_shape, shape_of
from darkformer.research.time.study import FITTED, HELD_OUT, PAIR, Run, Study, TimeStudy, read_study, record_file
from darkformer.train.linearize import linearize

SMOL = Shape(30, 576, 1536, 9, 3, 64, 49152, vectors=576 * 61)
Refused = Callable[..., str]


def few_trials() -> list[Trial]:
    """Both kinds of attention, and shapes that are held out."""
    rows = [
        Trial(f"{hidden} wide", llama_shape(layers, hidden, vocabulary=256, head_dim=16), 2, seq_len, features)
        for hidden, layers in ((32, 1), (64, 2))
        for seq_len, features in ((32, 0), (96, 0), (96, 16))
    ]
    return [*rows, *(row._replace(batch=4, held_out=True) for row in rows[1:3])]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with this machine's calibration in it, measured on small steps."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKFORMER_NATIVE_CACHE", str(cache_folder()))  # compiled already
        patch.setenv("XDG_CACHE_HOME", str(folder))
        calibrate_machine(few_trials(), ("float32",), calibration_file(), seconds=0.0)
    return folder


@pytest.fixture
def calibrated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    monkeypatch.setenv("DARKFORMER_NATIVE_CACHE", str(cache_folder()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return load_calibration()


@pytest.fixture
def known() -> Calibration:
    """A machine of known speeds: 1 GB/s, 10 GFLOP/s, and a microsecond a kernel."""
    speed = {"moved": 4e-9, "product": 1e-10, "softmax": 2e-10, "linear": 3e-10, "kernels": 1e-6, "constant": 0.0}
    return Calibration({}, {}, {"float32": speed}, {"float32": speed})


def shown(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# calibration


def test_the_trials_hold_out_what_is_larger() -> None:
    plan = trials()
    fitted, held_out = ([x for x in plan if x.held_out == flag] for flag in (False, True))
    assert 35 <= len(plan) <= 45
    for of in (lambda x: x.shape.hidden, lambda x: x.shape.layers, lambda x: x.seq_len):
        assert max(map(of, held_out)) > max(map(of, fitted))
    assert {bool(x.features) for x in held_out} == {bool(x.features) for x in fitted} == {True, False}


def test_a_calibration_says_what_it_found(calibrated: Calibration, tmp_path: Path) -> None:
    rows = calibrated.record["rows"]
    assert len(rows) == len(few_trials()) and all(min(row["seconds"], row["forward_seconds"]) > 0 for row in rows)
    for name, x in calibrated.steps["float32"].items():
        assert min(x.coefficients.values()) >= 0 and any(x.coefficients.values()), name
        assert 0 <= x.median_error <= x.worst_error
    assert calibrated.record["limits"]["gemm_flops"]["float32"] > 1e8


def test_an_interrupted_calibration_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, file = few_trials()[:4], tmp_path / "plan.json"
    plan = [*plan[:2], *(x._replace(held_out=True) for x in plan[2:])]
    from darkformer.research.time import calibration

    measured, calls = calibration.measured, []

    def counted(trial: Trial, dtype: str, seconds: float) -> dict[str, Any]:
        calls.append(trial)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(trial, dtype, seconds)

    monkeypatch.setattr(calibration, "measured", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate_machine(plan, ("float32",), file, seconds=0.0)
    with pytest.raises(InputError, match="not calibrated to the end"):
        load_calibration(file)
    calibrate_machine(plan, ("float32",), file, seconds=0.0)
    assert len(calls) == 5  # the third was tried twice, the first two were kept
    before = file.read_text()
    calibrate_machine(plan, ("float32",), file, seconds=0.0)
    assert len(calls) == 5 and file.read_text() == before
    calibrate_machine(plan, ("float32",), file, seconds=0.0, overwrite=True)
    assert len(calls) == 9


# estimates


def estimated(known: Calibration, shape: Shape = SMOL, **options: Any) -> Estimate:
    task = PlanTask(**{"dtype": "float32", **options})
    return estimate(shape, task, DarkConfig(), known, positions=8192, name="x")


def test_stages_are_those_of_linearize(known: Calibration) -> None:
    planned = estimated(known, context="8k", tokens="2M", budget="10%", transfer_steps=40)
    assert [stage.title for stage in planned.stages] == [
        "softmax: evaluate", "which heads need softmax", "heads and windows for the budget", "dark: calibrate",
        "converted: evaluate", "dark: transfer", "transferred: evaluate", "dark: finetune", "finetuned: evaluate",
    ]  # fmt: skip
    assert all(stage.seconds > 0 for stage in planned.stages) and planned.task.steps == 245
    titles = [stage.title for stage in estimated(known, tokens="0", budget="none").stages]
    assert titles == ["softmax: evaluate", "dark: calibrate", "converted: evaluate"]


class Titles(Silent):
    """A reporter that keeps the titles of the stages."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Any]:
        self.titles.append(title)
        with super().stage(title, total) as advance:
            yield advance


def test_linearize_has_these_stages(known: Calibration, model_folder: Path, text_glob: str, tmp_path: Path) -> None:
    task = PlanTask(context="600", tokens="600", budget="80%", transfer_steps=1, dtype="float32")
    shape, config = shape_of(load_config(str(model_folder)), "tiny"), DarkConfig(num_features=8)
    planned = estimate(shape, task, config, known, positions=2048, name="tiny")
    reporter = Titles()
    linearize(
        str(model_folder), tmp_path / "run", data=[text_glob], config=config, context=600, budget=task.budget,
        training=TrainConfig(steps=task.steps, transfer_steps=1, seq_len=600, batch_size=1, dtype="float32"),
        reporter=reporter,
    )  # fmt: skip
    not_planned = ("load the model", "read the text", "tokenize the text", "save the model")
    assert [title for title in reporter.titles if title not in not_planned] == [x.title for x in planned.stages]


def test_time_follows_the_task(known: Calibration) -> None:
    one, two = (estimated(known, tokens=text) for text in ("1M", "2M"))
    by_title = [{stage.title: stage.seconds for stage in x.stages} for x in (one, two)]
    ratio = by_title[1]["dark: finetune"] / by_title[0]["dark: finetune"]
    assert ratio == pytest.approx(two.task.steps / one.task.steps)
    del by_title[0]["dark: finetune"], by_title[1]["dark: finetune"]
    assert by_title[0] == by_title[1]
    assert estimated(known, llama_shape(2, 64, vocabulary=512)).step < one.step
    assert estimated(known, context="8k").memory > estimated(known, context="2k").memory
    # What fits into the hours takes the hours, but for the last step.
    hours = 1.5 * one.seconds / 3600
    fitting = estimated(known, tokens="1M", hours=hours)
    assert fitting.fitting is not None and fitting.fitting % fitting.task.sequence == 0
    whole = estimated(known, tokens=str(fitting.fitting))
    assert 3600 * hours - whole.step <= whole.seconds <= 3600 * hours
    assert estimated(known, tokens="1M", hours=1e-6).fitting == 0


def test_the_crossover_is_where_it_turns() -> None:
    assert crossover(lambda n: n >= 3000) == 3000
    assert crossover(lambda n: True) == 64
    assert crossover(lambda n: False) is None


def test_a_budget_buys_what_it_says() -> None:
    forms = [budget_config(SMOL, DarkConfig(), f"{p}%", 8192, "float32", count_features=False) for p in (8, 10, 20, 50)]
    heads = [len(form.keep_exact) for form in forms]
    assert {form.window for form in forms} == {256}
    assert heads == sorted(heads) and 0 < heads[1] < heads[3] < 90
    assert budget_config(SMOL, DarkConfig(), "0", 8192, "float32").keep_exact == ()
    assert budget_config(SMOL, DarkConfig(), "100%", 8192, "float32").method == "exact"
    with pytest.raises(ConfigError, match="give at least that, or 0"):
        budget_config(SMOL, DarkConfig(), "1%", 8192, "float32")


def test_a_budget_counts_the_layers_that_stay() -> None:
    """Gemma 3 270M at 32,768 tokens: as many exact heads as its record of budgets has."""
    gemma = Shape(
        18, 640, 2048, 4, 1, 256, 262144, sliding=(*range(5), *range(6, 11), *range(12, 17)), sliding_window=512
    )
    heads = {
        text: len(budget_config(gemma, DarkConfig(), text, 32768, "bfloat16").keep_exact)
        for text in ("10%", "40%", "70%")
    }
    assert heads == {"10%": 0, "40%": 1, "70%": 2}


def test_the_command_line_plans(model_folder: Path, calibrated: Calibration, known: Calibration) -> None:
    text = shown("plan", str(model_folder), "--context", "512", "--tokens", "10k", "--budget", "80%", "--hours", "1",
                 "--dtype", "float32")  # fmt: skip
    assert "dark: finetune" in text and "20 steps" in text and "1 hours hold" in text and "exact heads" in text
    command = next(line for line in text.splitlines() if line.startswith("darkformer linearize")).split()
    options = get_command(app).commands["linearize"]
    flags = {flag for p in options.params for flag in (*p.opts, *p.secondary_opts)}
    assert {word for word in command if word.startswith("--")} <= flags  # it is one that runs
    planned = estimated(known, context="4k", transfer_steps=7)
    assert "--seq-len 4096" in command_of(planned, "m") and "--transfer-steps 7" in command_of(planned, "m")


def test_the_usual_budget_is_planned_where_it_is_possible(known: Calibration) -> None:
    usual = estimated(known, context="2k")
    assert usual.task.budget == "10%" and usual.config.keep_exact and usual.config.no_features and not usual.notes
    assert "--budget 10%" in command_of(usual, "m")
    constant = estimated(known, context="2k", budget="0")  # its features learn, and so they count
    assert not constant.config.no_features and constant.config.window == 256
    assert estimated(known, context="2k", budget="0", tokens="0").config.no_features

    task = PlanTask(dtype="float32", transfer_steps=5)
    long, short = (estimate(SMOL, task, DarkConfig(), known, positions=n, name="x") for n in (2048, 600))
    assert (long.task.budget, long.config.window) == ("10%", 128)  # narrower than 256, beside features that count
    assert short.task.budget == "none" and "give at least that" in short.notes[0]
    assert short.notes[0] in estimate_lines(short, "m")
    near = estimated(known, context="128")
    assert near.task.budget == "none" and "no far field" in near.notes[0]
    with pytest.raises(ConfigError, match="no far field"):
        estimated(known, context="128", budget="10%")


def test_the_planned_command_without_a_budget(known: Calibration) -> None:
    config = DarkConfig(window=256, keep_exact=(3,))
    planned = estimate(SMOL, PlanTask(dtype="float32", budget="none"), config, known, positions=8192, name="x")
    command = command_of(planned, "m")
    assert "--budget none --window 256 --keep-exact=3" in command and "frontier" not in command


@pytest.mark.parametrize(
    ("text", "kilo", "tokens"), [("8k", 1024, 8192), ("2M", 1000, 2_000_000), ("1,024", 1000, 1024)]
)
def test_counts(text: str, kilo: int, tokens: int) -> None:
    assert count(text, "--tokens", kilo) == tokens


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "2 M", "1e6", "8kb"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ConfigError, match="give a number of tokens from 1 on"):
        count(text, "--context", 1024)


def test_bad_input_is_one_line(
    refused: Refused, model_folder: Path, calibrated: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(model_folder)
    assert "--context x" in refused("plan", model, "--context", "x")
    assert "from 2 on" in refused("plan", model, "--context", "1")
    assert "--hours -1" in refused("plan", model, "--hours", "-1")
    assert "dtype='int8'" in refused("plan", model, "--dtype", "int8")
    assert "budget='7'" in refused("plan", model, "--budget", "7", "--dtype", "float32")
    assert "softmax everywhere" in refused("plan", model, "--budget", "100%", "--dtype", "float32")
    assert "--keep-exact" in refused("plan", model, "--budget", "50%", "--keep-exact", "1")
    assert "calibrated in float32" in refused("plan", model, "--dtype", "bfloat16")
    assert "no such folder" in refused("plan", str(tmp_path / "nothing-here"))
    copy = shutil.copytree(model_folder, tmp_path / "model")
    settings = json.loads((copy / "config.json").read_text())
    for values, said in (
        ({"num_attention_heads": 0}, "configuration cannot be loaded"),
        ({"head_dim": -8}, "no decoder can be built"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"model_type": "mamba"}, "other mixers"),
    ):
        (copy / "config.json").write_text(json.dumps(settings | values))
        assert said in refused("plan", str(copy))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert "never calibrated" in refused("plan", model) and not (tmp_path / "empty").exists()


# the study


def small_study(text_glob: str) -> Study:
    sizes = ((32, 1), (64, 2))
    fitted = [Run(h, n, tokens, FITTED) for tokens in (256, 512, 1024) for h, n in sizes]
    others = [Run(64, 3, 512, HELD_OUT), Run(32, 4, 512, PAIR, 0, "p", True), Run(64, 1, 512, PAIR, 0, "p")]
    return Study((*fitted, *others), (text_glob,), 300, seq_len=32, batch_size=2, eval_tokens=256, least_text=1000)


def quiet() -> RichReporter:
    return RichReporter(Console(file=io.StringIO()))


def lasting(out: Path) -> list[dict[str, Any]]:
    """Record lines without times."""
    varying = ("seconds", "step_seconds", "environment")
    return [{k: v for k, v in line.items() if k not in varying} for line in read_study(out)[0]]


def test_the_study_is_resumed_to_the_same_numbers(
    text_glob: str, calibrated: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small_study(text_glob)
    TimeStudy(study, tmp_path / "whole", quiet()).run()
    trained, calls = study_module.trained, []

    def interrupted(run: Run, *args: Any) -> dict[str, Any]:
        calls.append(run.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return trained(run, *args)

    monkeypatch.setattr(study_module, "trained", interrupted)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        TimeStudy(study, out, quiet()).run()
    with pytest.raises(RunFolderError, match="--resume"):
        TimeStudy(study, out, quiet()).run()
    with pytest.raises(RunFolderError, match="other settings"):
        TimeStudy(replace(study, vocabulary=310), out, quiet()).run(resume=True)
    left = TimeStudy(study, out, quiet()).plan()
    assert [row[2] for row in left[1:-1]] == ["3", "1", "2"]
    TimeStudy(study, out, quiet()).run(resume=True)
    assert len(calls) == len(study.runs) + 1
    assert lasting(out) == lasting(tmp_path / "whole")
    tables = write_study(out)
    assert {"time-law", "time-predictions", "time-pairs", "time-best", "time-claims"} <= set(tables)
    assert len(tables["time-predictions"]) == 1 + 3 and len(tables["time-pairs"]) == 2
    assert (out / "plots" / "time.png").stat().st_size > 10_000
    lines, calibration = read_study(out)  # the records alone are enough to draw from
    assert study_tables(analyse(lines), lines, calibration) == tables


def test_the_wide_model_of_a_pair_has_the_deep_ones_time(text_glob: str, calibrated: Calibration) -> None:
    study = small_study(text_glob)
    speed = study_module.Speed(study, calibrated)
    deep, wide = study.runs[-2:]
    assert speed.steps(deep) == deep.tokens // study.step_tokens
    assert speed.seconds(wide) == pytest.approx(speed.seconds(deep), abs=0.5 * speed.step(wide))


def test_a_run_that_diverges_is_a_finished_run(text_glob: str) -> None:
    study = replace(small_study(text_glob), peak_rate=1e30)
    blocks = torch.randint(5, 300, (8, study.seq_len))
    row = study_module.trained(study.runs[0], study, 30, blocks, blocks, lambda *args: None)
    assert row["loss"] is None and row["tokens"] < 30 * study.step_tokens


def test_reproduce_time_refuses_what_it_cannot_do(refused: Refused, tmp_path: Path) -> None:
    assert "leave out --scale" in refused("reproduce", "time", "--scale", "full", "--out", str(tmp_path))
    missing = refused("reproduce", "time", "--plot-only", "--out", str(tmp_path))
    assert "darkformer reproduce time" in missing and not record_file(tmp_path / "time").exists()
