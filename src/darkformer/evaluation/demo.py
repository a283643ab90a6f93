"""The demo: one real pretrained model, linearized within budgets, compared with softmax; training is optional."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.budget import Budget, Choice, check_budget, check_budget_config, full_context
from ..calibration.calibrate import HeadChoice, calibrate
from ..config import DarkConfig, TrainConfig
from ..console import RichReporter
from ..errors import ConfigError
from ..hf.layers import config_of
from ..hf.load import demo_model_path, load_model, load_tokenizer, save_model
from ..hf.plan import plan_conversion
from ..records import (  # fmt: skip
    RECORD_FILE,
    check_folder,
    environment,
    finish_run,
    finished_record,
    open_run,
    read_kept,
    write_json,
    write_kept,
)
from ..train.data import Document, load_documents, split_documents, token_blocks
from ..train.distill import teacher_of
from ..train.linearize import begins, trained
from .budget import calibration, measured_choices
from .demo_report import write_report
from .frontier import FrontierRow, measure_frontier, measure_quality, row_work, speed_work
from .generation import generate_text, prompt_inputs
from .recall import RecallTask
from .settings import DemoConfig, FrontierSettings

#: What is measured of every row, beside loss and accuracy.
SETTINGS = FrontierSettings(
    recall=RecallTask(distances=(512, 1900), trials=20, numbers=8, batch_size=1), repeats=2, batches=(1, 8),
    new_tokens=8,
)  # fmt: skip
#: Rows of text and of recall that heads are chosen on: half of what `darkformer budget` takes, for half the time.
CHOICE_ROWS = 2
#: Blocks of the context that calibration sees; the last one is held back for its line search.
CALIBRATION_BLOCKS = 3
#: Rough seconds of a training step, of choosing heads and of a generation on two cores: for shares of the bar only.
STEP, CHOICE, GENERATION = 3.5, 120.0, 6.0


class Demo:
    """Measures the rows one after the other; each finished one is a JSON file that a later run starts from."""

    def __init__(
        self, demo: DemoConfig, default: DarkConfig, training: TrainConfig, out: Path, reporter: RichReporter,
        settings: FrontierSettings = SETTINGS,
    ) -> None:  # fmt: skip
        if default.window == 0:
            raise ConfigError("window=0: the demo also measures window and sinks alone: give a window of at least 1.")
        check_budget_config(default)
        constant = Budget.parse(demo.budget, 1).constant
        if training.trains and training.train == "geometry" and default.drop_features and not constant:
            raise ConfigError("train='geometry': the demo's budget keeps no features to train: use all, qkv or none.")
        self.demo, self.default, self.training, self.out, self.reporter = demo, default, training, out, reporter
        self.frontier = replace(settings, dtype=training.dtype, element_bytes=0)
        self.steps = training.steps if training.trains else 0
        self.model_name = demo.model or str(demo_model_path())
        # The package's path differs from machine to machine; its file's name says which model it is.
        shown = demo.model or Path(self.model_name).name
        self.settings = {
            "command": "demo", **asdict(demo), "model": shown, "data": list(demo.data), "config": default.to_dict(),
            "train": asdict(training),
        }  # fmt: skip

    def run(self, *, overwrite: bool = False) -> dict[str, Any]:
        """All rows, then table, plots, report and record. Returns the record."""
        check_folder(self.out)
        with self.reporter.stage(f"load text and {self.settings['model']}", 1):
            tokenizer = load_tokenizer(self.model_name)
            prompt_inputs(tokenizer, self.demo.prompt)  # refuses before anything is measured
            train, held_out = split_documents(load_documents(self.demo.data))
            advice = "give more text or a smaller --context"
            blocks = token_blocks(tokenizer, train, self.demo.context, "the training", advice)
            validation = token_blocks(tokenizer, held_out, self.demo.context, "the held-out", advice)
            validation = validation[: max(1, self.demo.eval_tokens // self.demo.context)]
            model = load_model(self.model_name)
            # Both refuse before the folder is claimed.
            plan_conversion(model, self.default)
            limit = Budget.parse(self.demo.budget, full_context(model))
            check_budget(model, limit, self.default, dtype=self.training.dtype, count_features=False)
        self.settings |= begins(tokenizer)
        if open_run(self.out, self.settings, resume=True, overwrite=overwrite):
            if (record := finished_record(self.out)) is not None:
                self.reporter.say(f"{self.out} holds this run, finished: here is its record. --overwrite runs again.")
                return record
            self.reporter.say(f"continuing the run in {self.out}")
        with self.reporter.whole("everything", *self._work(validation)):
            record = self._measured(model, tokenizer, blocks, validation)
            budget = next(row for row in record["rows"] if row["name"] == "budget")
            if self.steps and budget["error"] is None:
                record["rows"].append(self._trained_row(budget, tokenizer, train, blocks, validation))
        record = {**self.settings, **record, "environment": environment()}
        write_json(self.out / RECORD_FILE, record)
        write_report(record, self.out)
        finish_run(self.out, self.settings)
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        return record

    def rows(self, constant: DarkConfig, chosen: DarkConfig) -> tuple[FrontierRow, ...]:
        """Softmax, window and sinks alone, constant state with features, the budget."""
        return (
            FrontierRow("softmax", "softmax", None),
            FrontierRow("local", f"window {constant.window} and sinks", replace(constant, method="local")),
            FrontierRow("constant", "constant state, with features", constant, "constant"),
            FrontierRow("budget", f"budget {self.demo.budget}", chosen, self.demo.budget),
        )

    def _work(self, validation: Tensor) -> tuple[float, float]:
        """(all, done already) for the bar over everything."""
        rows = self.rows(self.default, self.default)
        work = {row.name: sum(row_work(row, validation, self.frontier).values()) for row in rows}
        work |= {"chosen": CHOICE, "speed": speed_work(len(rows), self.frontier)}
        work["trained"] = STEP * self.steps + work["softmax"] if self.steps else 0.0
        done = sum(amount for name, amount in work.items() if (self.out / "stages" / f"{name}.json").is_file())
        return sum(work.values()) + 2 * GENERATION, done

    def _measured(self, model: Any, tokenizer: Any, blocks: Tensor, validation: Tensor) -> dict[str, Any]:
        file = self.out / "stages" / "chosen.json"
        if not file.is_file():
            self.reporter.weigh(CHOICE)
            _, choices = measured_choices(
                model, tokenizer, blocks, ["0", self.demo.budget], self.default, at=None, dtype=self.frontier.dtype,
                folder=self.out / "stages" / "sensitivity", reporter=self.reporter, rows=CHOICE_ROWS,
            )  # fmt: skip
            write_kept(file, [[text, choice.to_dict()] for text, choice in choices])
        choices = read_kept(file, lambda kept: [(text, Choice.from_dict(values)) for text, values in kept])
        constant, chosen = choices[0][1].config, choices[-1][1].config
        batches = list(blocks[:CALIBRATION_BLOCKS].split(1))
        within = calibration(choices[1:], batches, self.frontier.element_bytes)

        def calibrated(converted: Any) -> list[HeadChoice]:
            # The row of constant state shows what features do; in a budget they must pay for their bytes.
            return calibrate(converted, batches) if config_of(converted) == constant else within(converted)

        def also(row: FrontierRow, converted: Any) -> dict[str, Any]:
            if row.name == "budget":
                save_model(converted, tokenizer, self.out / "model")
            return self._generation(converted, tokenizer) if row.name in ("softmax", "budget") else {}

        return measure_frontier(
            model, tokenizer, self.rows(constant, chosen), validation, self.out,
            settings=self.frontier, calibrate=calibrated, filler=self._filler(blocks), reporter=self.reporter,
            also=also,
        )  # fmt: skip

    def _filler(self, blocks: Tensor) -> Tensor:
        """Text around recalled numbers: what calibration has not seen, if there is any."""
        return blocks[CALIBRATION_BLOCKS:] if len(blocks) > CALIBRATION_BLOCKS else blocks

    def _trained_row(
        self, before: dict[str, Any], tokenizer: Any, train: list[Document], blocks: Tensor, validation: Tensor
    ) -> dict[str, Any]:
        """The budget's row after training: quality anew; bytes and speed do not depend on the weights."""
        file = self.out / "stages" / "trained.json"
        if file.is_file():
            return read_kept(file, lambda row: {**before, **row})
        title = f"{before['title']}, {self.steps} steps"
        row: dict[str, Any] = {"name": "trained", "title": title, "budget": ""}
        model = load_model(str(self.out / "model"))
        text = token_blocks(tokenizer, train, self.training.seq_len, "the training")
        self.reporter.weigh(STEP * self.steps)
        teacher = teacher_of(load_model(self.model_name)) if self.training.distill else None
        checkpoints = self.out / "checkpoints" / "trained"
        row["losses"] = trained(model, text, self.training, checkpoints, self.reporter, title, teacher=teacher)
        measure_quality(
            model, tokenizer, validation, self.frontier, row, filler=self._filler(blocks), reporter=self.reporter,
            title=title,
        )  # fmt: skip
        row |= self._generation(model, tokenizer)
        save_model(model, tokenizer, self.out / "model")
        write_kept(file, row)
        return {**before, **row}

    def _generation(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        self.reporter.weigh(GENERATION)
        with self.reporter.stage("generate", 1) as advance:
            result = generate_text(model, tokenizer, self.demo.prompt, self.demo.new_tokens)
            advance(1, 1)
        return {"continued": result}
