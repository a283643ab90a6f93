"""`darkformer reproduce time`: small models trained on real text, from which the loss law's coefficients come."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...console import RichReporter
from ...errors import InputError, NonFiniteError
from ...records import environment, open_run, write_json
from ...train.data import PYTHON
from ...train.evaluate import evaluate
from ..reproduce.corpus import Corpus
from ..reproduce.plan import Base, Scale
from ..reproduce.records import read_lines, write_lines
from .calibration import (
    Calibration,
    adamw,
    calibrate_machine,
    calibration_file,
    dtypes,
    is_calibrated,
    load_calibration,
    machine,
    model_of,
    read_calibration,
    training_step,
    trials,
)
from .copies import step_operations, totals
from .shape import Shape, llama_shape

#: Runs of the law, runs that test it, and runs that compare a wide with a deep model of equal size and equal time.
FITTED, HELD_OUT, PAIR = "fit", "held out", "pair"
#: Width at which a run's rate is the study's; it falls with the root of the width. Warm-up, a share of the steps.
RATE_WIDTH, WARMUP = 128, 0.05
HEAD_DIM = 32
DTYPE = "float32"


@dataclass(frozen=True)
class Run:
    """One model trained once.

    Attributes:
        tokens: to train on. Of the wide model of a pair: those that its deep partner has in the same time.
        pair: names the pair, else empty. deep: whether it is the pair's deep model.
    """

    hidden: int
    layers: int
    tokens: int
    role: str
    seed: int = 0
    pair: str = ""
    deep: bool = False

    @property
    def name(self) -> str:
        """Names it in the record."""
        part = f"{self.hidden}x{self.layers}"
        return f"{self.role}.{self.pair or self.tokens}.{part}.seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """All runs, their text and their steps; saved whole, and compared when the study is resumed."""

    runs: tuple[Run, ...]
    data: tuple[str, ...] = (PYTHON,)
    vocabulary: int = 1024
    seq_len: int = 256
    batch_size: int = 4
    eval_tokens: int = 32_768
    least_text: int = 5_000_000
    peak_rate: float = 3e-3

    def shape(self, run: Run) -> Shape:
        """The shape of a run's model."""
        return llama_shape(run.layers, run.hidden, vocabulary=self.vocabulary, head_dim=HEAD_DIM)

    def rate(self, run: Run, step: int, steps: int) -> float:
        """The learning rate of a step: linear warm-up, cosine decay to zero, lower for wider models."""
        peak = self.peak_rate * math.sqrt(RATE_WIDTH / run.hidden)
        warm = max(1, round(WARMUP * steps))
        return peak * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.seq_len * self.batch_size

    def scale(self) -> Scale:
        """The text, as the other reproductions take it."""
        base = Base("small", self.seq_len, self.batch_size, num_features=0)
        return Scale(
            "time", self.data, {"small": base}, (), least_text=self.least_text, vocabulary=self.vocabulary,
            eval_tokens=self.eval_tokens,
        )  # fmt: skip

    def shortened(self, steps: int) -> Study:
        """At most `steps` steps a run, in as many lengths as before, so that there is a law to fit, from less text."""
        lengths = sorted({run.tokens for run in self.runs})
        most = {tokens: max(1, steps * (i + 1) // len(lengths)) for i, tokens in enumerate(lengths)}
        return replace(
            self, runs=tuple(replace(run, tokens=most[run.tokens] * self.step_tokens) for run in self.runs),
            eval_tokens=min(self.eval_tokens, 2048), least_text=min(self.least_text, 100_000),
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Plain values for the run folder."""
        return {"command": "reproduce time", **asdict(self), "machine": machine()}


def laptop_study() -> Study:
    """39 runs of 0.3 to 6.3 million parameters, meant for less than three hours of two cores."""
    sizes = ((64, 5), (96, 4), (128, 4), (160, 5), (192, 6), (256, 5), (288, 5))
    fitted = [Run(h, n, tokens, FITTED) for tokens in (200_000, 500_000, 1_250_000) for h, n in sizes]
    others = ((128, 8, 500_000), (224, 4, 800_000), (320, 4, 1_250_000), (96, 6, 2_000_000), (192, 6, 2_000_000),
              (352, 4, 500_000))  # fmt: skip
    held_out = [Run(h, n, tokens, HELD_OUT) for h, n, tokens in others]
    pairs = [
        Run(hidden, layers, 400_000, PAIR, seed, pair, deep)
        for seed in (0, 1)
        for pair, deep_shape, wide_shape in (
            ("1.4M", (96, 12), (192, 3)), ("3.3M", (128, 16), (256, 4)), ("5.1M", (160, 16), (320, 4)),
        )
        for (hidden, layers), deep in ((deep_shape, True), (wide_shape, False))
    ]  # fmt: skip
    return Study((*fitted, *held_out, *pairs))


class Speed:
    """Predicted seconds of the study's steps."""

    def __init__(self, study: Study, calibration: Calibration) -> None:
        self.study, self.calibration = study, calibration

    def step(self, run: Run) -> float:
        """Seconds of one optimizer step."""
        shape = self.study.shape(run)
        rows = step_operations(shape, self.study.batch_size, self.study.seq_len)
        return self.calibration.seconds(DTYPE, totals(rows))

    def steps(self, run: Run) -> int:
        """Optimizer steps: those of its tokens, or as many as its deep partner's time allows."""
        steps = max(1, run.tokens // self.study.step_tokens)
        if run.role != PAIR or run.deep:
            return steps
        partner = next(x for x in self.study.runs if x.deep and (x.pair, x.seed) == (run.pair, run.seed))
        return max(1, round(steps * self.step(partner) / self.step(run)))

    def seconds(self, run: Run) -> float:
        """Seconds of its training."""
        return self.steps(run) * self.step(run)


def trained(run: Run, study: Study, steps: int, train: Tensor, held_out: Tensor, advance: Any) -> dict[str, Any]:
    """Trains one model from random weights; its loss on held-out text (None where it diverged) and its times."""
    torch.manual_seed(run.seed)
    shape = study.shape(run)
    model = model_of(shape, study.seq_len)
    optimizer = adamw(model, study.peak_rate)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed))
    order = order.repeat(-(-steps * study.batch_size // len(order)))
    times, last = [], math.nan
    for step in range(steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = study.rate(run, step, steps)
        ids = train[order[step * study.batch_size : (step + 1) * study.batch_size]]
        last = float(training_step(model, optimizer, ids))
        times.append(time.perf_counter() - started)
        advance(step + 1, steps, last)
        if not math.isfinite(last):
            break
    loss = None
    if math.isfinite(last):
        with contextlib.suppress(NonFiniteError):  # a run that diverged in its last step
            loss = evaluate(model, held_out).loss
    return {
        "parameters": shape.parameters,
        "steps": steps,
        "tokens": len(times) * study.step_tokens,
        "epochs": len(times) * study.batch_size / len(train),
        "loss": loss,
        "seconds": sum(times),
        "step_seconds": statistics.median(times),
    }


def record_file(out: Path) -> Path:
    """The record lines of the study, one a run."""
    return out / "records" / "time.jsonl"


def read_study(out: Path) -> tuple[list[dict[str, Any]], Calibration]:
    """The finished runs in a folder, and the calibration that they were planned with.

    Raises:
        InputError: there are none.
    """
    lines, file = read_lines(record_file(out)), out / "records" / "calibration.json"
    if not lines or not file.is_file():
        raise InputError(
            f"{record_file(out)}: no such record, or an empty one. Run `darkformer reproduce time` first, or name the "
            "folder that has it with --out."
        )
    return lines, read_calibration(file)


class TimeStudy:
    """The study in one folder: each finished run is a line of `records/time.jsonl`."""

    def __init__(self, study: Study, out: Path, reporter: RichReporter) -> None:
        self.study, self.out, self.reporter = study, out, reporter

    def _calibration(self, *, anew: bool = False) -> Calibration:
        """That of the folder, which fixes how long pairs train; else, or for a study begun anew, this machine's.

        A machine that was never calibrated is calibrated first.
        """
        own, file = self.out / "records" / "calibration.json", calibration_file()
        if own.is_file() and not anew:
            return read_calibration(own)
        if is_calibrated(file):
            return load_calibration(file)
        return calibrate_machine(trials(), dtypes(), file, reporter=self.reporter)

    def plan(self) -> list[list[str]]:
        """The plan as a table: runs, those left, steps and predicted hours by role. Calibrates, does nothing else."""
        speed, done = Speed(self.study, self._calibration()), {x["run"] for x in read_lines(record_file(self.out))}
        rows = [["runs", "number", "left", "parameters", "steps left", "hours left"]]
        for role in (FITTED, HELD_OUT, PAIR):
            own = [run for run in self.study.runs if run.role == role]
            left = [run for run in own if run.name not in done]
            sizes = [self.study.shape(run).parameters / 1e6 for run in own]
            rows.append([
                role, str(len(own)), str(len(left)), f"{min(sizes):.1f}M to {max(sizes):.1f}M" if own else "–",
                f"{sum(map(speed.steps, left)):,}", f"{sum(map(speed.seconds, left)) / 3600:.2f}",
            ])  # fmt: skip
        rows.append(["all", *("",) * 4, f"{sum(float(row[-1]) for row in rows[1:]):.2f}"])
        return rows

    def run(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Every run that is left. Ctrl-C loses the run under way, some minutes, and nothing else.

        Raises:
            DarkformerError: a folder with another study, too little text.
        """
        calibration = self._calibration(anew=overwrite)  # before the folder is claimed: it may take minutes
        if open_run(self.out, self.study.settings(), resume=resume, overwrite=overwrite):
            self.reporter.say(f"continuing the study in {self.out}")
        write_json(self.out / "records" / "calibration.json", calibration.record)
        with self.reporter.stage(f"gather text: {', '.join(self.study.data)}", 1):
            scale = self.study.scale()
            corpus = Corpus(scale, self.out)
            blocks = corpus.blocks(scale.bases["small"])
        lines = read_lines(record_file(self.out))
        self._check_text(lines, corpus.facts)
        speed, done, facts = Speed(self.study, calibration), {line["run"] for line in lines}, environment()
        left = [run for run in self.study.runs if run.name not in done]
        with self.reporter.whole("everything", sum(map(speed.seconds, left))):
            for i, run in enumerate(left):
                self.reporter.weigh(speed.seconds(run))
                with self.reporter.stage(f"train {run.name}", speed.steps(run)) as advance:
                    row = trained(run, self.study, speed.steps(run), blocks.train, blocks.evaluation, advance)
                row |= {
                    "predicted_step_seconds": speed.step(run), "step_tokens": self.study.step_tokens,
                    "batch_size": self.study.batch_size, "seq_len": self.study.seq_len,
                    "vocabulary": self.study.vocabulary,
                }  # fmt: skip
                lines.append({"run": run.name, **asdict(run), **row, "text": corpus.facts, "environment": facts})
                write_lines(record_file(self.out), lines)
                loss = "diverged" if row["loss"] is None else f"loss {row['loss']:.3f}"
                self.reporter.say(f"[{i + 1}/{len(left)}] {run.name}: {loss}, {row['seconds']:.0f} s")

    def _check_text(self, lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
        for line in lines:
            if line["text"]["fingerprint"] != facts["fingerprint"]:
                raise InputError(
                    f"{self.out}: {line['run']} was trained on text {line['text']['fingerprint']}, here is "
                    f"{facts['fingerprint']} (other versions of the packages it comes from, or text/ was deleted): put "
                    "text/documents.json back, or start afresh with --overwrite."
                )
