"""One model trained once: convert, score, train through `finetune`, score; killed at any moment, it continues."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config import TrainConfig
from ...errors import DarkformerError, NonFiniteError
from ...hf.convert import convert
from ...records import environment
from ...reporting import Reporter
from ...train.evaluate import evaluate
from ...train.finetune import finetune
from ...train.linearize import convert_and_calibrate
from .bases import grown_weights, keep_grown, make_model
from .corpus import Corpus
from .mechanism import measure
from .plan import LEAST_GEOMETRY_LR, Run, Scale, experiment_of, form, grid_runs, grower, training
from .records import Journal, is_writer, recorded, write_lines

#: Methods whose estimator (or, for softmax, whose queries and keys) is looked into along training.
LOOKED_INTO = ("exact", "dark", "performer", "lfk", "ours")
#: Points at which it is looked into, at most, besides the first and the last.
LOOKS = 4
#: Logits of one evaluation batch at most, 600 MB with their bfloat16 source: Gemma has a vocabulary of 262,144.
LOGITS = 100_000_000


class Runner:
    """Does the runs of a plan in one folder: `stages/RUN/record.jsonl` once a run is finished."""

    def __init__(self, scale: Scale, out: Path, corpus: Corpus, reporter: Reporter) -> None:
        self.scale, self.out, self.corpus, self.reporter = scale, out, corpus, reporter
        self.environment = environment()
        self._finished = recorded(out)

    def lines(self, run: Run) -> list[dict[str, Any]]:
        """The record of a finished run: its points and, last, the run itself; empty while it is not finished."""
        return self._finished.get(run.name, [])

    def left(self, runs: Iterable[Run]) -> list[Run]:
        """Those of `runs` that are still to do.

        A record is no model: where runs on `grown` are left and its weights are gone, it is trained once more, first.
        """
        left = [run for run in runs if not self.lines(run)]
        grown = grower(self.scale)
        needed = any(self.scale.bases[run.experiment.base].source == "grown" for run in left)
        if grown is not None and needed and grown not in left and grown_weights(self.out) is None:
            del self._finished[grown.name]
            left.insert(0, grown)
        return left

    def rate(self, run: Run) -> float:
        """The rate of a run: its own, or the one with the least loss on the tuning text in its method's grid.

        Raises:
            DarkformerError: at every rate of the grid the method diverged.
        """
        if run.lr is not None:
            return run.lr
        owner = run.experiment
        if owner.rates_of:
            owner = experiment_of(self.scale, owner.rates_of)
        tried = {trial.lr: self.lines(trial)[-1]["final_loss"] for trial in grid_runs(owner, run.method)}
        best = min((loss, lr) for lr, loss in tried.items() if lr is not None and loss is not None) if any(
            loss is not None for loss in tried.values()
        ) else None  # fmt: skip
        if best is None:
            raise DarkformerError(f"{run.title}: training diverged at every rate of the grid ({owner.rates}).")
        return best[1]

    def do(self, run: Run, work: float = 0.0) -> list[dict[str, Any]]:
        """Runs, or returns the lines of a run that is finished. `work` is its training's weight in the whole."""
        if found := self.lines(run):
            return found
        started = time.perf_counter()
        trial = _Trial(self, run)
        trial.train(work)
        rows = trial.record(round(time.perf_counter() - started, 1))
        if grower(self.scale) == run and trial.diverged is None:
            keep_grown(trial.model, self.corpus.tokenizer(trial.base), self.out)
        if is_writer():
            write_lines(trial.folder / "record.jsonl", rows)
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)
        self._finished[run.name] = rows
        del trial
        gc.collect()
        return rows


class _Trial:
    """One run under way."""

    def __init__(self, runner: Runner, run: Run) -> None:
        self.run, self.runner, self.folder = run, runner, runner.out / "stages" / run.name
        self.base = runner.scale.bases[run.experiment.base]
        self.blocks = runner.corpus.blocks(self.base)
        self.training: TrainConfig = training(run, runner.scale, runner.rate(run))
        self.config = form(run, self.base.num_features)
        self.resumed = (self.folder / "losses.jsonl").is_file()
        self.points, self.losses = Journal(self.folder / "points.jsonl"), Journal(self.folder / "losses.jsonl")
        self.diverged: dict[str, Any] | None = None
        with runner.reporter.stage(f"{run.title}: load", 1):
            self.model = make_model(self.base, run.seed, runner.scale, runner.out)
        if self.config is not None and run.method == "ours" and self.base.pretrained:
            convert_and_calibrate(self.model, self.config, self.blocks.train, runner.reporter, run.title)
        elif self.config is not None:
            convert(self.model, self.config)

    def train(self, work: float) -> None:
        """Trains, scoring on the way; a run that stops being finite is finished too, and says where."""
        last = self.run.steps
        evaluated = () if self.run.grid else self.run.experiment.evaluated()
        if not self.run.grid:
            self.score(0)
        hooks = {step: self._scorer(step) for step in evaluated if step < last}
        self.runner.reporter.weigh(work)
        with self.runner.reporter.stage(self.run.title, last) as advance:

            def on_step(step: int, loss: float) -> None:
                self.losses.add({"step": step, "loss": loss})
                advance(step, last, loss)

            try:
                finetune(
                    self.model, self.blocks.train, self.training, self.folder / "checkpoints", resume=True,
                    on_step=on_step, after_step=hooks,
                )  # fmt: skip
            except NonFiniteError as error:
                self.diverged = {"step": max(self.losses.rows, default=0) + 1, "reason": str(error)}
        self.score(last)

    def _scorer(self, step: int) -> Any:
        return lambda: self.score(step)

    def _looked_into(self, step: int) -> bool:
        experiment = self.run.experiment
        if self.run.grid or not experiment.mechanism or self.run.method not in LOOKED_INTO:
            return False
        points = experiment.evaluated()
        return step in (0, *points[:: max(1, len(points) // LOOKS)], points[-1])

    def score(self, step: int) -> None:
        """Loss and accuracy on held-out text after `step` steps; None where they are not finite."""
        if step in self.points.rows:
            return
        text = self.blocks.tuning if self.run.grid else self.blocks.evaluation
        row: dict[str, Any] = {"step": step, "loss": None, "accuracy": None, "perplexity": None}
        if self.diverged is None:
            try:
                row |= self._evaluated(step, text)
            except NonFiniteError as error:
                row["problem"] = str(error)
        self.points.add(row)
        if not self.run.grid and row["loss"] is not None:
            self.runner.reporter.say(
                f"  {self.run.title}, step {step}/{self.run.steps}: loss {row['loss']:.3f}, "
                f"accuracy {row['accuracy']:.2%}"
            )

    def _evaluated(self, step: int, text: Tensor) -> dict[str, Any]:
        logits = text.shape[1] * self.model.config.get_text_config().vocab_size
        batch = max(1, min(2048 // text.shape[1], LOGITS // logits))
        with self.runner.reporter.stage(f"{self.run.title}: evaluate", -(-len(text) // batch)) as advance:
            score = evaluate(self.model, text, batch_size=batch, dtype=self.training.dtype, progress=advance)
            looked = {"mechanism": measure(self.model, text)} if self._looked_into(step) else {}
        return score.to_dict() | looked

    def record(self, seconds: float) -> list[dict[str, Any]]:
        """The lines of this run: one a point, and one with everything it depended on."""
        run, experiment = self.run, self.run.experiment
        common = {
            "run": run.name, "figure": experiment.figure, "base": experiment.base, "method": run.method,
            "seed": run.seed, "grid": run.grid, "lr": self.training.lr, "steps": run.steps,
        }  # fmt: skip
        points = self.points.ordered()
        whole = {
            "kind": "run", **common, "final_loss": points[-1]["loss"], "diverged": self.diverged,
            "losses": [row["loss"] for row in self.losses.ordered()], "budget": asdict(self.training),
            "config": None if self.config is None else self.config.to_dict(), "start": asdict(self.base),
            "weights": grown_weights(self.runner.out) if self.base.source == "grown" else None,
            "text": self.runner.corpus.facts, "train_blocks": len(self.blocks.train),
            "eval_blocks": len(self.blocks.evaluation), "seconds": seconds, "resumed": self.resumed,
            "least_geometry_lr": LEAST_GEOMETRY_LR, "environment": self.runner.environment,
        }  # fmt: skip
        return [*({"kind": "point", **common, **row} for row in points), whole]
