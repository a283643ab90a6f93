"""A reproduction from plan to pictures."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...console import RichReporter
from ...errors import ConfigError, InputError, RunFolderError
from ...records import open_run
from . import figure1, figure2, figure3, figure4, figure5, timing, verdicts
from .bases import check_available
from .corpus import Corpus
from .plan import Run, Scale, planned
from .records import is_writer, read_lines, recorded, unfinished, write_lines
from .run import Runner

MODULES: tuple[Any, ...] = (figure1, figure2, figure3, figure4, figure5)
#: Figure → the module that draws it.
FIGURES = {name: module for module in MODULES for name in module.FIGURES}


def chosen_figures(name: str) -> tuple[str, ...]:
    """`all`, one figure, `2` for both halves of the second, or one experiment of a figure: `3.grown`.

    Raises:
        ConfigError: no such figure.
    """
    if name == "all":
        return tuple(FIGURES)
    if name.split(".")[0] in FIGURES and "." in name:
        return (name,)
    found = tuple(figure for figure in FIGURES if figure == name or figure.split("-")[0] == name)
    if not found:
        names = ", ".join(FIGURES)
        raise ConfigError(
            f"figure {name!r}: there is none; choose all, 2, {names}, 3.grown and the like, time or width."
        )
    return found


def record_file(out: Path, figure: str) -> Path:
    """The record lines a figure is drawn from."""
    return out / "records" / f"figure{figure}.jsonl"


def table_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows[1:])]) + "\n"


def draw(out: Path, figures: Sequence[str], *, strict: bool = False) -> dict[str, list[list[str]]]:
    """Draws figures from the records in `out` alone: `plots/*.png`, `tables/*.md`. Returns their tables.

    The verdicts on the paper's claims, from all records there are, come last, under the name `claims`.

    Args:
        strict: a figure without a record is an error; else it is left out.

    Raises:
        InputError: no record (with `strict`).
    """
    tables, records = {}, {figure: read_lines(record_file(out, figure)) for figure in FIGURES}
    for figure in figures:
        lines = records[figure]
        if not lines:
            if strict:
                raise InputError(
                    f"{record_file(out, figure)}: no such record, or an empty one; figure {figure} is drawn from it. "
                    f"Run `darkformer reproduce {figure} --out {out}` first, or name the folder that has it with --out."
                )
            continue
        FIGURES[figure].draw(lines, out / "plots")
        tables[f"figure{figure}"] = FIGURES[figure].table(lines)
    known = {figure: lines for figure, lines in records.items() if lines}
    tables["claims"] = verdicts.rows(known, unfinished(out, known))
    for name, rows in tables.items():
        (out / "tables").mkdir(parents=True, exist_ok=True)
        (out / "tables" / f"{name}.md").write_text(table_markdown(rows), encoding="utf-8")
    return tables


class Reproduction:
    """Runs what a set of figures needs, and draws what there is after every experiment."""

    def __init__(self, scale: Scale, figures: Sequence[str], out: Path, reporter: RichReporter) -> None:
        self.scale, self.out, self.reporter = scale, out, reporter
        chosen = [name for name in figures if name != "1" or scale.lengths]
        self.runs = planned(scale, chosen)
        self.figures = list(dict.fromkeys(name.split(".")[0] for name in chosen))

    def plan(self) -> list[list[str]]:
        """The plan as a table: per experiment its runs, those left, steps and hours. Calibrates, does nothing else."""
        if self.scale.name != "laptop":
            return self._plan_rows({})
        return self._plan_rows(self._speeds(self.runs))

    def _speeds(self, runs: Sequence[Run]) -> dict[str, timing.Speed]:
        with self.reporter.stage("time a few training steps", 1):
            return timing.measure(self.scale, runs)

    def _plan_rows(self, speeds: dict[str, timing.Speed]) -> list[list[str]]:
        rows = [["figure", "model", "methods", "seeds", "runs", "left", "steps", "s/step", "hours left"]]
        whole, done = 0.0, recorded(self.out)
        if "1" in self.figures:
            left = 0 if read_lines(record_file(self.out, "1")) else 1
            whole += left * timing.figure1_seconds(self.scale)
            rows.append(["1", "operator", "", "", "1", str(left), "", "", f"{whole / 3600:.2f}"])
        for experiment in dict.fromkeys(run.experiment for run in self.runs):
            own = [run for run in self.runs if run.experiment == experiment]
            left_runs = [run for run in own if run.name not in done]
            speed = speeds.get(experiment.base)
            spent = sum(timing.seconds(run, self.scale, speeds) for run in left_runs) if speed else 0.0
            whole += spent
            rows.append([
                experiment.figure, experiment.base, str(len({run.method for run in own})),
                str(len({run.seed for run in own})), str(len(own)), str(len(left_runs)),
                f"{sum(run.steps for run in left_runs):,}", f"{speed.step:.2f}" if speed else "–",
                f"{spent / 3600:.2f}" if speed else "–",
            ])  # fmt: skip
        rows.append(["all", "", "", "", str(len(self.runs)), "", "", "", f"{whole / 3600:.2f}" if speeds else "–"])
        return rows

    def run(self, *, resume: bool = False, overwrite: bool = False) -> dict[str, list[list[str]]]:
        """All that is left of the plan, then every figure. Returns the figures' tables.

        Raises:
            DarkformerError: bad settings, a folder with another reproduction, too little text, a missing package.
            Interrupted: Ctrl-C, after a checkpoint.
        """
        for base in {run.experiment.base for run in self.runs}:
            check_available(self.scale.bases[base])
        if open_run(self.out, self.scale.settings(), resume=resume, overwrite=overwrite):
            self.reporter.say(f"continuing the reproduction in {self.out}")
        if "1" in self.figures:
            self._first_figure()
        if self.runs:
            self._others()
        self._assemble()
        return draw(self.out, self.figures)

    def _first_figure(self) -> None:
        file = record_file(self.out, "1")
        if not read_lines(file):  # it is written when everything is measured
            self.reporter.say("figure 1: measuring the operator")
            write_lines(file, figure1.measure(self.scale, self.out / "stages" / "1", self.reporter))
            draw(self.out, ("1",))

    def _others(self) -> None:
        with self.reporter.stage(f"gather text: {', '.join(self.scale.data)}", 1):
            corpus = Corpus(self.scale, self.out)
            facts = corpus.facts
        self.reporter.say(
            f"text: {facts['documents']:,} documents, {facts['characters']:,} characters, "
            f"fingerprint {facts['fingerprint']}"
        )
        runner = Runner(self.scale, self.out, corpus, self.reporter)
        self._check_text(runner, facts["fingerprint"])
        left = runner.left(self.runs)
        speeds = {} if not left or self.scale.name != "laptop" else self._speeds(left)
        work = {run: timing.seconds(run, self.scale, speeds) if speeds else float(run.steps) for run in left}
        gc.collect()  # what the calibration left behind would be frozen with the rest
        gc.freeze()  # each run collects garbage three times; the libraries' own objects are none, and cost 0.4 s a time
        try:
            with self.reporter.whole("everything", sum(work.values())):
                self._each(runner, left, work)
        finally:
            gc.unfreeze()

    def _each(self, runner: Runner, left: list[Run], work: dict[Run, float]) -> None:
        started, done = time.perf_counter(), 0.0
        for i, run in enumerate(left):
            line = runner.do(run, work[run])[-1]
            done += work[run]
            ahead = (sum(work.values()) - done) * (time.perf_counter() - started) / done
            loss = "diverged" if line["final_loss"] is None else f"loss {line['final_loss']:.3f}"
            self.reporter.say(
                f"[{i + 1}/{len(left)}] {run.title}{' (grid)' if run.grid else ''}: {loss} after {run.steps} steps, "
                f"{line['seconds']:.0f} s; about {ahead / 3600:.1f} h left"
            )
            if i + 1 < len(left) and left[i + 1].experiment != run.experiment:  # after the last one `run` draws
                self._assemble()
                draw(self.out, self.figures)

    def _check_text(self, runner: Runner, fingerprint: str) -> None:
        for run in self.runs:
            for line in runner.lines(run)[-1:]:
                if line["text"]["fingerprint"] != fingerprint:
                    raise RunFolderError(
                        f"{self.out}: {run.name} was trained on text {line['text']['fingerprint']}, here is "
                        f"{fingerprint} (other versions of the packages it comes from, or text/ was deleted): put "
                        "text/documents.json back, or start afresh with --overwrite."
                    )

    def _assemble(self) -> None:
        """The finished runs' lines, one file a figure, in the order of the plan."""
        if not is_writer():
            return
        done = recorded(self.out)
        every = planned(self.scale, [e.figure for e in self.scale.experiments])
        for figure in dict.fromkeys(run.experiment.figure for run in self.runs):
            runs = [run for run in every if run.experiment.figure == figure]
            if lines := [line for run in runs for line in done.get(run.name, [])]:
                write_lines(record_file(self.out, figure), lines)
