"""The reproduction on a tiny model: plan arithmetic, kills and resumes, records, pictures, bad input."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from darkformer import ConfigError, InputError, RunFolderError
from darkformer.cli import app, main
from darkformer.console import RichReporter
from darkformer.research.reproduce import run as run_module
from darkformer.research.reproduce import timing
from darkformer.research.reproduce.figure5 import spikes
from darkformer.research.reproduce.plan import METHODS, Base, Experiment, Run, Scale, form, planned, training
from darkformer.research.reproduce.records import Journal, read_lines, recorded, unfinished
from darkformer.research.reproduce.scales import FULL, LAPTOP, SCALES
from darkformer.research.reproduce.session import Reproduction, chosen_figures, draw, record_file

RATES = (1e-3, 3e-3)
TOP = Experiment("2-top", "small", tuple(METHODS), 6, RATES, grid_steps=2, points=3, mechanism=True)
LONG = Experiment("3", "grown", ("exact", "dark", "performer"), 6, (), rates_of="2-top.small", spacing="log")
BAND = Experiment("5", "grown", ("dark", "performer"), 4, (1e-3, 1e30), every_rate=True, seeds=(0, 1), points=2)


def tiny(text_glob: str) -> Scale:
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    bases = {name: Base(name, seq_len=32, batch_size=2, num_features=8, save_every=4) for name in ("small", "grown")}
    return Scale(
        "tiny", (text_glob,), bases, (TOP, LONG, BAND), least_text=1000, vocabulary=400, eval_tokens=256, small=small
    )


def two_methods(text_glob: str) -> Scale:
    """Enough for an interruption: exact before, DARK in the middle."""
    short = replace(TOP, methods=("exact", "dark"), rates=RATES[:1])
    return replace(tiny(text_glob), experiments=(short,))


def reproduction(scale: Scale, figures: tuple[str, ...], out: Path) -> Reproduction:
    return Reproduction(scale, figures, out, RichReporter(Console(file=io.StringIO())))


def comparable(out: Path, figure: str) -> list[dict[str, Any]]:
    """Record lines without what differs from one execution to the next."""
    varying = ("seconds", "environment", "resumed")
    return [{k: v for k, v in line.items() if k not in varying} for line in read_lines(record_file(out, figure))]


@pytest.fixture(scope="module")
def whole(text_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All figures of the tiny scale, uninterrupted."""
    out = tmp_path_factory.mktemp("reproduce") / "whole"
    reproduction(tiny(text_glob), ("2-top", "3", "5"), out).run()
    return out


class TestPlan:
    def test_every_method_shares_everything_but_its_attention(self) -> None:
        base, scale = LAPTOP.bases["smollm2"], replace(LAPTOP, dtype="bfloat16")
        experiment = next(e for e in LAPTOP.experiments if e.key == "2-bottom.smollm2")
        configs = {training(Run(experiment, method, 1, None), scale, 1e-3) for method in METHODS}
        assert len(configs) == 1 and configs.pop().dtype == "bfloat16"
        forms = {m: form(Run(experiment, m, 1, None), base.num_features) for m in METHODS}
        assert forms["exact"] is None and {f.num_features for f in forms.values() if f} == {base.num_features}
        paper = [f for m, f in forms.items() if f and m != "ours"]
        assert all((f.window, f.sinks, f.center, f.balance, f.cold_start) == (0, 0, False, False, False) for f in paper)
        assert forms["ours"] is not None and forms["ours"].window > 0

    def test_the_laptop_plan(self) -> None:
        runs = planned(LAPTOP, ("2-top", "2-bottom", "3", "4", "5"))
        names = [run.name for run in runs]
        assert len(set(names)) == len(names)
        first_second_seed = next(i for i, run in enumerate(runs) if run.seed)
        assert not any(run.seed == 0 for run in runs[first_second_seed:])  # most evidence first
        for figure in ("4", "5"):
            assert {run.seed for run in runs if run.experiment.figure == figure} == {0, 1}
        for i, run in enumerate(runs):
            if run.lr is None:  # a rate is chosen before it is used
                owner = run.experiment.rates_of or run.experiment.key
                tried = [r for r in runs[:i] if r.grid and r.method == run.method and r.experiment.key == owner]
                assert len(tried) == 3
        rates = sorted({r.lr for r in runs if r.experiment.figure == "5" and r.lr})
        assert len(rates) == 7 and rates[-1] / rates[0] == pytest.approx(100)
        long = [e for e in LAPTOP.experiments if e.figure == "3"]
        assert {e.base: e.steps >= least for e, least in zip(long, (2000, 600), strict=True)} == dict.fromkeys(
            ("grown", "smollm2"), True
        )

    def test_one_figure_brings_what_it_needs(self) -> None:
        names = [run.name for run in planned(LAPTOP, ("5",))]
        assert names[3] == "2-top.small.exact.seed0" and len(names) == 4 + 28

    def test_time_adds_up(self) -> None:
        speeds = {name: timing.Speed(1.0, 512) for name in LAPTOP.bases}
        run = Run(next(e for e in LAPTOP.experiments if e.key == "2-bottom.smollm2"), "dark", 0, None)
        scored = 5 * LAPTOP.eval_tokens / 512 * timing.EVALUATION
        expected = run.steps + timing.OVERHEAD_STEPS + scored + timing.OVERHEAD_SECONDS
        assert timing.seconds(run, LAPTOP, speeds) == pytest.approx(expected)
        assert timing.seconds(replace(run, method="ours"), LAPTOP, speeds) > expected

    def test_evaluations(self) -> None:
        assert replace(TOP, steps=100, points=4).evaluated() == (25, 50, 75, 100)
        assert replace(TOP, steps=1000, points=3, spacing="log").evaluated() == (10, 100, 1000)
        assert replace(TOP, steps=2, points=9).evaluated() == (1, 2)

    def test_shortened(self) -> None:
        short = LAPTOP.shortened(8)
        assert max(e.steps for e in short.experiments) == 8 and max(e.grid_steps for e in short.experiments) == 2
        assert max(short.lengths) == 4096

    def test_the_full_plan_exists(self) -> None:
        assert {run.experiment.figure for run in planned(FULL, ("2-top", "2-bottom", "3", "4", "5"))} == {
            "2-top", "2-bottom", "3", "4", "5",
        }  # fmt: skip
        with pytest.raises(ConfigError, match="figure 1: not part of scale 'full'"):
            planned(FULL, ("1",))


class TestRecords:
    def test_every_evaluation_is_a_line(self, whole: Path) -> None:
        lines = read_lines(record_file(whole, "2-top"))
        for method in METHODS:
            points = [line for line in lines if line["kind"] == "point" and line["method"] == method]
            assert [p["step"] for p in points if not p["grid"]] == [0, 2, 4, 6]
            assert sorted(p["lr"] for p in points if p["grid"]) == list(RATES)
            (run,) = [x for x in lines if x["kind"] == "run" and x["method"] == method and not x["grid"]]
            assert len(run["losses"]) == 6 and run["text"]["fingerprint"]
            tried = {
                x["lr"]: x["final_loss"] for x in lines if x["kind"] == "run" and x["method"] == method and x["grid"]
            }
            assert run["lr"] == min(tried, key=lambda lr: tried[lr])

    def test_all_start_from_the_same_weights_and_batches(self, whole: Path) -> None:
        lines = read_lines(record_file(whole, "2-top"))
        start = {
            x["method"]: x["loss"] for x in lines if x["kind"] == "point" and not x["grid"] and x["step"] == 0
        }  # fmt: skip
        assert start["dark"] == pytest.approx(start["performer"], rel=1e-6)  # M = I: the same features
        assert start["lfk"] == pytest.approx(start["performer"], rel=1e-6)
        assert len({round(v, 6) for v in start.values()}) > 3  # and the others are others

    def test_mechanism(self, whole: Path) -> None:
        lines = read_lines(record_file(whole, "2-top"))
        points = [x for x in lines if x["kind"] == "point" and x["method"] == "dark" and not x["grid"]]
        first, last = (p["mechanism"] for p in (points[0], points[-1]))
        for rows in (first, last):
            assert [row["layer"] for row in rows] == [0, 1]
            assert all(1 <= row["query_rank"] <= 8 and row["log_moment"] > 0 for row in rows)
        geometry = first[0]["geometry"]
        assert geometry["condition"] == pytest.approx(1) and geometry["to_whitening"] == pytest.approx(
            geometry["identity_to_whitening"]
        )
        assert last[0]["geometry"]["condition"] > 1
        exact = [x for x in lines if x["kind"] == "point" and x["method"] == "exact" and not x["grid"]]
        assert "log_moment" in exact[0]["mechanism"][0] and "geometry" not in exact[0]["mechanism"][0]

    def test_a_divergent_rate_is_a_finished_run(self, whole: Path) -> None:
        runs = [x for x in read_lines(record_file(whole, "5")) if x["kind"] == "run"]
        assert len(runs) == 8
        assert all((x["diverged"] is not None) == (x["lr"] > 1) for x in runs)
        bad = next(x for x in runs if x["diverged"])
        assert 1 <= bad["diverged"]["step"] <= 4 and bad["final_loss"] is None

    def test_long_runs_use_the_chosen_rates(self, whole: Path) -> None:
        top = {x["method"]: x["lr"] for x in read_lines(record_file(whole, "2-top")) if not x["grid"]}
        assert {x["method"]: x["lr"] for x in read_lines(record_file(whole, "3"))} == {
            m: top[m] for m in ("exact", "dark", "performer")
        }


@pytest.fixture(scope="module")
def uncut(text_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two methods' uninterrupted run."""
    out = tmp_path_factory.mktemp("reproduce") / "uncut"
    reproduction(two_methods(text_glob), ("2-top",), out).run()
    return out


class TestKilled:
    """SIGKILL in the middle of a run, a half-written line and a half-written checkpoint: the same record in the end."""

    CODE = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from research.test_reproduce import reproduction, two_methods
from darkformer.research.reproduce import run as run_module
add = run_module.Journal.add
def dying(self, row):
    add(self, row)
    if self.file.parent.name == {name!r} and self.file.name == "losses.jsonl" and row["step"] == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
run_module.Journal.add = dying
import torch
torch.set_num_threads(1)
reproduction(two_methods({glob!r}), ("2-top",), Path({out!r})).run()
"""

    @pytest.mark.parametrize(("step", "damage"), [(5, False), (6, True)])
    def test_resumed_it_is_the_uninterrupted_run(
        self, uncut: Path, text_glob: str, tmp_path: Path, step: int, damage: bool
    ) -> None:
        out, name = tmp_path / "cut", "2-top.small.dark.seed0"
        tests = str(Path(__file__).parents[1])
        code = self.CODE.format(path=[tests], name=name, step=step, glob=text_glob, out=str(out))
        killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        stage = out / "stages" / name
        assert not (stage / "record.jsonl").exists() and (stage / "checkpoints" / "checkpoint-4").is_dir()
        if damage:
            (stage / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
            with (stage / "losses.jsonl").open("a") as stream:
                stream.write('{"step": 6, "lo')
        work = reproduction(two_methods(text_glob), ("2-top",), out)
        with pytest.raises(RunFolderError, match="--resume continues it"):
            work.run()
        work.run(resume=True)
        assert comparable(out, "2-top") == comparable(uncut, "2-top")
        assert read_lines(stage / "record.jsonl")[-1]["resumed"]

    def test_ctrl_c_between_is_no_loss_either(
        self, uncut: Path, text_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add = Journal.add

        def interrupting(self: Journal, row: dict[str, Any]) -> None:
            add(self, row)
            if self.file.parent.name == "2-top.small.exact.seed0" and row["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(run_module.Journal, "add", interrupting)
        with pytest.raises(KeyboardInterrupt):
            reproduction(two_methods(text_glob), ("2-top",), tmp_path / "cut").run()
        monkeypatch.undo()
        reproduction(two_methods(text_glob), ("2-top",), tmp_path / "cut").run(resume=True)
        assert comparable(tmp_path / "cut", "2-top") == comparable(uncut, "2-top")


class TestRecordsAlone:
    """The run folders are gone, the figures' records are there: what is finished stays finished."""

    @pytest.fixture
    def bare(self, whole: Path, tmp_path: Path) -> Path:
        out = tmp_path / "bare"
        shutil.copytree(whole / "records", out / "records")
        shutil.copy(whole / "run.json", out / "run.json")
        return out

    def test_nothing_runs_again(self, whole: Path, text_glob: str, bare: Path) -> None:
        work = reproduction(tiny(text_glob), ("2-top", "3", "5"), bare)
        assert all(row[5] == "0" for row in work._plan_rows({})[1:-1])
        work.run(resume=True)
        assert not (bare / "stages").exists()
        assert all(comparable(bare, figure) == comparable(whole, figure) for figure in ("2-top", "3", "5"))

    def test_what_is_left_runs_on_a_model_trained_once_more(self, whole: Path, text_glob: str, bare: Path) -> None:
        file = record_file(bare, "5")
        gone = "5.grown.performer.seed1.lr0.001"
        file.write_text("".join(json.dumps(x) + "\n" for x in read_lines(file) if x["run"] != gone))
        reproduction(tiny(text_glob), ("5.grown",), bare).run(resume=True)
        assert {p.name for p in (bare / "stages").iterdir()} == {gone, "2-top.small.exact.seed0"}
        assert comparable(bare, "5") == comparable(whole, "5")
        assert all(len(x["weights"]) == 16 for x in comparable(bare, "5") if x["kind"] == "run")

    def test_what_the_plan_has_and_the_records_lack(self, whole: Path, bare: Path) -> None:
        lines = {figure: read_lines(record_file(bare, figure)) for figure in ("2-top", "3", "5")}
        assert unfinished(bare, lines) == {}
        lines["5"] = [line for line in lines["5"] if line["run"] != "5.grown.performer.seed1.lr0.001"]
        del lines["3"]
        assert unfinished(bare, lines) == {"3": ["grown"], "5": ["grown"]}

    def test_half_a_run_is_none(self, whole: Path, bare: Path) -> None:
        file = record_file(bare, "5")
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
        assert set(recorded(whole)) - set(recorded(bare)) == {"5.grown.performer.seed1.lr1e+30"}


class TestDrawing:
    def test_from_records_alone(self, whole: Path, tmp_path: Path) -> None:
        for figure in ("2-top", "3", "5"):
            target = record_file(tmp_path, figure)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(record_file(whole, figure).read_bytes())
        tables = draw(tmp_path, ("2-top", "3", "5"), strict=True)
        for name, rows in tables.items():
            assert name == "claims" or (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert (tmp_path / "tables" / f"{name}.md").read_text().count("\n") == len(rows) + 1
        top = tables["figure2-top"]
        assert len(top) == 1 + len(METHODS) and "not in the paper" in top[-1][1]
        assert any(row[-1] not in ("never", "diverged at step") for row in tables["figure5"])

    def test_half_a_record_is_drawn(self, whole: Path, tmp_path: Path) -> None:
        target = record_file(tmp_path, "2-top")
        target.parent.mkdir()
        lines = [x for x in read_lines(record_file(whole, "2-top")) if x["method"] in ("exact", "lfk")]
        target.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert len(draw(tmp_path, ("2-top",), strict=True)["figure2-top"]) == 3

    def test_spikes(self) -> None:
        assert spikes([3.0] * 60) == 0
        assert spikes([3.0] * 30 + [4.1, 4.2, 3.0, 4.3] + [3.0] * 5) == 2
        assert spikes([9.0, 5.0, 3.0]) == 0  # the start is no spike


class TestCommandLine:
    def test_figure_1_in_small(self, text_glob: str, tmp_path: Path) -> None:
        scale = replace(tiny(text_glob), lengths=(128, 512))
        table = reproduction(scale, ("1",), tmp_path / "run").run()["figure1"]
        assert table[0][:2] == ["path", "slope of time"] and table[0][3:] == ["128, ms", "512, ms"]
        assert {row[0] for row in table[1:]} >= {"sdpa", "chunked"}
        (tmp_path / "run" / "plots" / "figure1.png").unlink()
        again = CliRunner().invoke(app, ["reproduce", "1", "--plot-only", "--out", str(tmp_path / "run")])
        assert again.exit_code == 0 and (tmp_path / "run" / "plots" / "figure1.png").is_file()

    def test_a_reduced_budget(self, text_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`darkformer reproduce FIGURE --steps N`, as anyone would try it."""
        monkeypatch.setitem(SCALES, "laptop", replace(tiny(text_glob), experiments=(TOP,)))
        monkeypatch.setattr(timing, "measure", lambda scale, runs: {"small": timing.Speed(0.01, 64)})
        words = ["reproduce", "2-top", "--steps", "2", "--dtype", "float32", "--out", str(tmp_path / "run")]
        plan = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
        assert plan.exit_code == 0 and not (tmp_path / "run").exists() and "hours left" in plan.output
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0 and "DARK" in done.output and "Records:" in done.output
        lines = read_lines(record_file(tmp_path / "run", "2-top"))
        assert {line["method"] for line in lines} == set(METHODS) and {line["steps"] for line in lines} == {1, 2}
        assert {p.name for p in (tmp_path / "run" / "plots").iterdir()} == {"figure2-top.png"}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["6"], "figure '6': there is none; choose all, 2, 1, 2-top"),
            (["2-top", "--plot-only"], "no such record.*darkformer reproduce 2-top --out"),
            (["1", "--scale", "planet"], "--scale planet: unknown; choose one of laptop, full"),
            (["2-top", "--data", "nothing-*.txt"], "no file matches"),
            (["2-top", "--dtype", "float16"], "dtype='float16' is unknown: choose one of auto, float32, bfloat16"),
        ],
    )
    def test_bad_input(
        self, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["darkformer", "reproduce", *words, "--out", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        import re

        assert re.search(message, " ".join(capsys.readouterr().err.split()))

    def test_too_little_text(self, text_glob: str, tmp_path: Path) -> None:
        scale = replace(tiny(text_glob), least_text=10**9)
        with pytest.raises(InputError, match="apt install perl-doc"):
            reproduction(scale, ("2-top",), tmp_path / "run").run()

    def test_changed_settings(self, whole: Path, text_glob: str) -> None:
        with pytest.raises(RunFolderError, match="eval_tokens: 256 there, 512 now"):
            reproduction(replace(tiny(text_glob), eval_tokens=512), ("2-top",), whole).run(resume=True)

    def test_other_text(self, whole: Path, text_glob: str, tmp_path: Path) -> None:
        shutil.copytree(whole, tmp_path / "copy")
        file = tmp_path / "copy" / "text" / "documents.json"
        file.write_text(json.dumps(["other text " * 500, "and more " * 500]))
        with pytest.raises(RunFolderError, match="was trained on text"):
            reproduction(tiny(text_glob), ("2-top",), tmp_path / "copy").run(resume=True)

    def test_names(self) -> None:
        assert chosen_figures("2") == ("2-top", "2-bottom")
        assert chosen_figures("3.grown") == ("3.grown",)
        assert {run.experiment.key for run in planned(LAPTOP, ("3.grown",))} == {"2-top.small", "3.grown"}
        with pytest.raises(ConfigError, match=r"figure 3\.nothing: not part of scale 'laptop', which has"):
            planned(LAPTOP, ("3.nothing",))
        assert chosen_figures("all") == ("1", "2-top", "2-bottom", "3", "4", "5")
