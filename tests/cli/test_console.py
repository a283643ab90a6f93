"""Progress in a terminal and without one, by a clock that stands still: which lines appear, when, and where."""

from __future__ import annotations

import io
import queue
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hang import HANG_SECONDS
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from darkformer import DarkConfig, TrainConfig, calibrate, convert, finetune, load_model
from darkformer.cli import app, terminal
from darkformer.console import LINE_EVERY, Clock, PlainConsole, RichReporter
from darkformer.evaluation.generation import PrintableStreamer
from darkformer.plots import loss_by_position, recall_against_distance
from darkformer.reporting import printable
from darkformer.train.linearize import _say_if_worse, trained


class StandingClock(Clock):
    """Time passes when the test says so, and waiting for it never ends before the stage does."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        return stop.wait(HANG_SECONDS)


class Bell(StandingClock):
    """Waiting ends when the test rings: False says that the time is over, True that the stage is."""

    def __init__(self) -> None:
        self.asked: queue.Queue[float] = queue.Queue()
        self.rings: queue.Queue[bool] = queue.Queue()

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        self.asked.put(seconds)
        return self.rings.get(timeout=HANG_SECONDS)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def reporter(clock: Clock, file: io.StringIO | None = None, **environment: str) -> RichReporter:
    console = Console(file=file or io.StringIO(), width=120, _environ={"TERM": "xterm", **environment})
    return RichReporter(console, clock)


def lines(of: RichReporter) -> list[str]:
    assert isinstance(of.console.file, io.StringIO)
    return of.console.file.getvalue().splitlines()


def test_a_stage_writes_its_start_its_end_and_a_line_every_30_seconds() -> None:
    clock = StandingClock()
    log = reporter(clock)
    with log.stage("dark: finetune", 100) as advance:
        for step in range(1, 101):
            clock.time += 1.0
            advance(step, 100, 4.0 - step / 100)
    assert lines(log) == [
        "dark: finetune: started, 0/100",
        "dark: finetune: 30/100, loss 3.700, 0:00:30 elapsed, about 0:01:10 left",
        "dark: finetune: 60/100, loss 3.400, 0:01:00 elapsed, about 0:00:40 left",
        "dark: finetune: 90/100, loss 3.100, 0:01:30 elapsed, about 0:00:10 left",
        "dark: finetune: done, 100/100, loss 3.000, 0:01:40 elapsed",
    ]


def test_slow_steps_write_a_line_each_and_fast_stages_two() -> None:
    clock = StandingClock()
    log = reporter(clock)
    with log.stage("slow", 3) as advance:
        for step in (1, 2, 3):
            clock.time += 2 * LINE_EVERY
            advance(step, 3)
    with log.stage("fast", 1):
        pass
    assert lines(log) == [
        "slow: started, 0/3",
        "slow: 1/3, 0:01:00 elapsed",
        "slow: 2/3, 0:02:00 elapsed, about 0:01:00 left",
        "slow: 3/3, 0:03:00 elapsed, about 0:00:00 left",
        "slow: done, 3/3, 0:03:00 elapsed",
        "fast: started",
        "fast: done, 0:00:00 elapsed",
    ]


def test_lines_appear_while_one_step_lasts() -> None:
    clock = Bell()
    log = reporter(clock)
    with log.stage("end to end", 1):
        for beat in (1, 2):
            assert clock.asked.get(timeout=HANG_SECONDS) == LINE_EVERY
            clock.time = beat * LINE_EVERY
            clock.rings.put(False)
        clock.asked.get(timeout=HANG_SECONDS)  # both lines are written
        clock.rings.put(True)
    assert lines(log) == [
        "end to end: started",
        "end to end: 0:00:30 elapsed",
        "end to end: 0:01:00 elapsed",
        "end to end: done, 0:01:00 elapsed",
    ]


def test_a_resumed_stage_knows_the_time_left() -> None:
    """Steps that an earlier run did are not this run's speed."""
    clock = StandingClock()
    log = reporter(clock)
    with log.stage("finetune", 500) as advance:
        for step in range(401, 405):
            clock.time += 10.0
            advance(step, 500)
    assert lines(log)[1] == "finetune: 403/500, 0:00:30 elapsed, about 0:16:10 left"


def test_only_the_innermost_stage_writes() -> None:
    clock = StandingClock()
    log = reporter(clock)
    with log.stage("outer", 2) as outer:
        with log.stage("inner", 2) as inner:
            clock.time += LINE_EVERY
            outer(1, 2)
            inner(1, 2)
        clock.time += LINE_EVERY
        outer(2, 2)
    names = [line.split(":")[0] for line in lines(log)]
    assert names == ["outer", "inner", "inner", "inner", "outer", "outer"]


def test_the_whole_stands_behind_the_stage() -> None:
    clock = StandingClock()
    log = reporter(clock)
    with log.whole("everything", 100):
        log.weigh(80.0)
        with log.stage("first", 4) as advance:
            for step in range(1, 5):
                clock.time += 20.0
                advance(step, 4)
        with log.stage("not weighed", 1) as advance:
            clock.time += LINE_EVERY
            advance(1, 1)
    assert lines(log)[1] == "first: 2/4, 0:00:40 elapsed, about 0:00:40 left; everything 40 %, about 0:01:00 left"
    assert "; everything 80 %" in next(line for line in lines(log) if line.startswith("not weighed: 0:"))


def test_a_stage_that_fails_says_so() -> None:
    log = reporter(StandingClock())
    with pytest.raises(KeyboardInterrupt), log.stage("finetune", 9) as advance:
        advance(3, 9)
        raise KeyboardInterrupt
    assert lines(log)[-1] == "finetune: stopped, 3/9, 0:00:00 elapsed"
    with log.stage("next", 1):
        pass
    assert lines(log)[-1].startswith("next: done")


def test_a_terminal_gets_bars() -> None:
    clock = StandingClock()
    bars = reporter(clock, Terminal())
    with bars.whole("everything", 2), bars.stage("finetune", 2) as advance:
        clock.time += LINE_EVERY
        advance(1, 2, 1.0)
        with bars.stage("evaluate", 1):  # one bar more: all are drawn again
            pass
    shown = bars.console.file.getvalue()  # type: ignore[attr-defined]
    assert "━" in shown and "finetune" in shown and "everything" in shown and "evaluate" in shown and "50%" in shown
    assert "started" not in shown and "done" not in shown


def test_colours_make_no_terminal() -> None:
    """FORCE_COLOR is set in many CI logs."""
    log = reporter(StandingClock(), FORCE_COLOR="1")
    with log.stage("finetune", 2):
        pass
    assert [line.split(":")[1] for line in lines(log)] == [" started, 0/2", " done, 0/2, 0"]


@pytest.mark.parametrize("train", ["none", "all"])
def test_training_writes_its_loss(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], train: str
) -> None:
    model, blocks = load_model(str(model_folder)), torch.randint(5, 300, (4, 32))
    budget = TrainConfig(train=train, steps=2, seq_len=32, batch_size=2, dtype="float32")
    log = reporter(StandingClock())
    losses = trained(model, blocks, budget, tmp_path, log, "dark")
    if train == "none":
        assert not losses and not lines(log)
    else:
        assert lines(log)[-1] == f"dark: finetune: done, 2/2, loss {losses[-1]:.3f}, 0:00:00 elapsed"
    assert capfd.readouterr() == ("", "")


def test_the_library_stays_silent(model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, blocks = load_model(str(model_folder)), torch.randint(5, 300, (4, 64))
    convert(model, DarkConfig(num_features=8, window=8))
    calibrate(model, blocks.split(2))
    finetune(model, blocks, TrainConfig(steps=1, seq_len=64, batch_size=2, dtype="float32"), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_results_go_to_standard_output_and_progress_does_not(
    model_folder: Path, text_glob: str, tmp_path: Path
) -> None:
    words = ["evaluate", str(model_folder), "--data", text_glob, "--context", "64", "--dtype", "float32"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)
    name = model_folder.name
    assert "perplexity" in result.stdout and "elapsed" not in result.stdout
    began = [line for line in result.stderr.splitlines() if "started" in line]
    assert [line.split(": started")[0] for line in began] == [f"{name}: load text and model", f"{name}: evaluate"]
    assert f"{name}: evaluate: done" in result.stderr and "perplexity" not in result.stderr


HOSTILE = "\x1b[2J\x9b31m\x07\u202e[/] :smile: $a$ |\ud800"
SHOWN = r"\x1b[2J\x9b31m\x07\u202e[/] :smile: $a$ |\ud800"


def test_control_characters_are_written_out() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("two\nlines\tand naïve 漢字 שלום") == "two\nlines\tand naïve 漢字 שלום"


def test_a_console_prints_names_as_they_are() -> None:
    console = PlainConsole(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    table = Table("model", HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE, "1")
    console.print(table)
    console.print(HOSTILE, HOSTILE)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(SHOWN) == 5 and not set(shown) & set("\x1b\x9b\x07\u202e\ud800")


@pytest.mark.parametrize("terminal", [True, False])
def test_titles_of_stages_are_printed_as_they_are(terminal: bool) -> None:
    log = reporter(StandingClock(), Terminal() if terminal else None)
    with log.whole(f"all {HOSTILE}", 1), log.stage(HOSTILE, 2) as advance:
        advance(1, 2)
        log.say(f"said {HOSTILE}")
    shown = log.console.file.getvalue()  # type: ignore[attr-defined]
    assert f"said {SHOWN}" in shown and shown.count(SHOWN) > 2
    assert "\x1b[2J" not in shown and not set(shown) & set("\x9b\x07\u202e\ud800")


def test_generated_text_is_written_out_as_it_streams(capfd: pytest.CaptureFixture[str]) -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(map(chr, ids))

    streamer = PrintableStreamer(Tokenizer())  # type: ignore[arg-type]
    for character in "a \x1b[31mred \u202eb\n":
        streamer.put(torch.tensor([ord(character)]))
    streamer.end()
    assert capfd.readouterr().out.strip() == r"a \x1b[31mred \u202eb"


def test_generate_writes_a_prompt_out(model_folder: Path) -> None:
    words = ["generate", str(model_folder), "--prompt", "a \x1b[31mred", "--max-new-tokens", "1"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.stdout.startswith(r"a \x1b[31mred") and "\x1b" not in result.stdout


def test_a_model_of_any_name_is_evaluated_to_the_end(
    model_folder: Path, text_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing fails once the work is done: not the tables, not the plots."""
    monkeypatch.setattr(terminal.console, "width", 300)
    for name in ("a[/]b \x1b[31m", r"$\frac$", "_hidden"):
        model = shutil.copytree(model_folder, tmp_path / name)
        words = ["evaluate", str(model), "--out", str(tmp_path / "out[/]")]
        words += ["--data", text_glob, "--context", "64", "--dtype", "float32", "--max-tokens", "64"]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0 and "\x1b" not in result.output
        assert printable(name) in result.stdout


def test_plots_of_any_name(tmp_path: Path) -> None:
    buckets = [{"start": 1, "stop": 64, "loss": 2.0}]
    points = {"window": 8, "recall": [{"distance": 16, "accuracy": 0.5}]}
    names = (HOSTILE, r"$\frac$", r"\$x$", "_hidden")
    loss_by_position(dict.fromkeys(names, buckets), tmp_path / "loss.png")
    recall_against_distance(dict.fromkeys(names, points), tmp_path / "recall.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "recall.png"))


def test_a_finetuning_that_spoils_is_told() -> None:
    told: list[str] = []
    reporter = SimpleNamespace(say=told.append)
    scores = {"converted": {"loss": 2.0}, "transferred": {"loss": 1.9}, "finetuned": {"loss": 1.9}}
    _say_if_worse(scores, TrainConfig(), reporter)
    assert not told  # as good as before
    _say_if_worse({**scores, "finetuned": {"loss": 1.95}}, TrainConfig(lr=1e-3), reporter)
    assert len(told) == 1 and "1.900 → 1.950" in told[0] and "--lr 0.001" in told[0]
