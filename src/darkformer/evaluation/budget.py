"""`darkformer budget`: what each budget would buy of a softmax model, measured before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.budget import (  # fmt: skip
    Budget,
    Choice,
    Chooser,
    cache_element_bytes,
    calibrate_within,
    check_budget_config,
    full_context,
    kept_bytes,
)
from ..calibration.calibrate import HeadChoice
from ..calibration.sensitivity import Sensitivity, sensitivity
from ..config import DarkConfig
from ..errors import ConfigError
from ..hf.layers import config_of
from ..hf.load import load_model, load_tokenizer
from ..hf.plan import plan_conversion
from ..records import check_folder, finish_run, open_run, read_kept, write_json, write_kept
from ..reporting import Reporter, Silent
from ..train.linearize import begins, calibration_batches, check_context, choice_batches, load_context_text
from .frontier import FrontierRow, measure_frontier
from .settings import BudgetTask, FrontierSettings

RECORD, PICTURE = "budget.json", "frontier.png"


def frontier_rows(choices: Sequence[tuple[str, Choice]], windows: Sequence[int], sinks: int) -> list[FrontierRow]:
    """Softmax, windows alone, and one row a budget, (text, choice)."""
    rows = [FrontierRow("softmax", "softmax", None, "100%")]
    for window in windows:
        config = DarkConfig(method="local", window=window, sinks=sinks)
        rows.append(FrontierRow(f"window-{window}", f"window {window} and sinks alone", config))
    for text, choice in choices:
        if choice.config.method == "exact":
            continue  # softmax has a row already
        title = "constant state" if Budget.parse(text, choice.length).constant else f"budget {text}"
        name = "budget-" + "".join(c if c.isalnum() or c == "." else "" for c in text)
        rows.append(FrontierRow(name, title, choice.config, text))
    return rows


def with_budget(budgets: Sequence[str], text: str, model: Any, at: int | None, dtype: str) -> tuple[str, ...]:
    """`budgets` and one more, from the least bytes to the most; as they are where it is one of them."""
    length = at or full_context(model)
    softmax = kept_bytes(model, None, length, cache_element_bytes(model, dtype))
    parsed = {each: Budget.parse(each, length) for each in (*budgets, text)}
    if parsed[text] in [parsed[each] for each in budgets]:
        return tuple(budgets)
    return tuple(sorted(parsed, key=lambda each: parsed[each].bytes_of(softmax)))


def _kept_choice(file: Path, budget: list[Any]) -> Choice | None:
    """What an earlier run chose, if it did for this budget."""

    def read(kept: dict[str, Any]) -> Choice | None:
        return Choice.from_dict(kept["choice"]) if kept["budget"] == budget else None

    return read_kept(file, read) if file.is_file() else None


def measured_choices(
    model: Any, tokenizer: Any, blocks: Tensor, budgets: Sequence[str], config: DarkConfig, *, at: int | None,
    dtype: str, folder: Path, reporter: Reporter, rows: int | None = None,
) -> tuple[Sensitivity, list[tuple[str, Choice]]]:  # fmt: skip
    """Which heads need softmax, and what each budget keeps. A budget that is too small for the model is left out.

    Args:
        blocks: (N, context) tokens to choose on.
        folder: partial results are kept there.
        rows: of text, and as many of recall, that the choice is made on; None: what `choice_batches` gives.

    Raises:
        ConfigError: none of the budgets fits.
    """
    batches = choice_batches(blocks)[:rows]
    with reporter.stage("which heads need softmax", 1) as advance:
        found = sensitivity(
            model, batches, tokenizer=tokenizer, sinks=config.sinks, dtype=dtype, prompts=rows or 4, folder=folder,
            progress=advance,
        )  # fmt: skip
    chooser: Chooser | None = None
    length, choices, problem = at or full_context(model), list[tuple[str, Choice]](), ConfigError("none was asked for")
    with reporter.stage("heads and windows for each budget", len(budgets)) as advance:
        for i, text in enumerate(budgets):
            file = folder / f"choice-{i}.json"
            if (known := _kept_choice(file, [text, length])) is not None:
                choices.append((text, known))
            else:
                chooser = chooser or Chooser(
                    model, batches, found, tokenizer=tokenizer, config=config, dtype=dtype, prompts=rows or 4,
                    count_features=False, folder=folder,
                )  # fmt: skip
                try:
                    choice = chooser.choose(Budget.parse(text, length))
                except ConfigError as error:
                    problem = error
                    reporter.say(f"left out: {error}")
                else:
                    choices.append((text, choice))
                    write_kept(file, {"budget": [text, length], "choice": choice.to_dict()})
            advance(i + 1, len(budgets))
    if not choices:
        raise ConfigError(f"no budget of {', '.join(budgets)} fits this model: {problem}")
    for text, choice in choices:
        reporter.say(f"  {text:>5}  {choice}")
    return found, choices


def calibration(
    choices: Sequence[tuple[str, Choice]], batches: Sequence[Tensor], element_bytes: int
) -> Callable[[Any], list[HeadChoice]]:
    """For `measure_frontier`: calibrates a converted model within the bytes of the budget that it was chosen for.

    Budgets that lie close together may buy the same heads and windows; such models keep within the smallest of them.
    """
    limits: dict[DarkConfig, tuple[int, int]] = {}
    for text, choice in choices:
        if (size := Budget.parse(text, choice.length).limit(choice.softmax)) is not None:
            limit = size, choice.length
            limits[choice.config] = min(limit, limits.get(choice.config, limit))

    def calibrated(model: Any) -> list[HeadChoice]:
        limit, length = limits.get(config_of(model), (None, 1))
        return calibrate_within(model, batches, limit, length=length, element_bytes=element_bytes)

    return calibrated


def run_budget(
    model_name: str,
    out: Path,
    task: BudgetTask,
    config: DarkConfig,
    settings: FrontierSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """The frontier of a model: softmax, windows alone, and each budget; `budget.json` and `frontier.png` in `out`.

    Args:
        config: everything but heads and windows.

    Returns:
        The record: that of `measure_frontier`, with `sensitivity`, `choices` and the task.

    Raises:
        DarkformerError: bad input, or a folder that holds another run.
    """
    reporter, started = reporter or Silent(), time.perf_counter()
    check_budget_config(config)
    check_folder(out)
    claim = {
        "command": "budget", "model": model_name, "config": config.to_dict(),
        **{name: list(x) if isinstance(x, tuple) else x for name, x in vars(task).items()},
    }  # fmt: skip
    tokenizer = load_tokenizer(model_name)
    blocks, held_out = load_context_text(task.data, task.held_out, tokenizer, task.context, reporter)
    with reporter.stage("load the model", 1):
        model = load_model(model_name)
    check_context(model.config, task.context)
    claim |= begins(tokenizer)
    reporter.say(str(plan_conversion(model, config)))  # before the folder is claimed
    open_run(out, claim, resume=resume, overwrite=overwrite)
    record = measure_budgets(
        model, tokenizer, blocks, held_out, out, task, config, settings, folder=out / "sensitivity", reporter=reporter
    )  # fmt: skip
    record["task"]["model"] = Path(model_name).name
    record["seconds"] = round(time.perf_counter() - started, 1)
    write_json(out / RECORD, record)
    finish_run(out, claim)
    return record


def measure_budgets(
    model: Any, tokenizer: Any, blocks: Tensor, held_out: Tensor, out: Path, task: BudgetTask, config: DarkConfig,
    settings: FrontierSettings, *, folder: Path, reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Chooses and measures every budget of the task on a softmax model; `budget.json` and `frontier.png` in `out`.

    Args:
        blocks, held_out: (N, context) tokens to choose and calibrate on, and to score.
        folder: partial results of the choice.

    Returns:
        See `run_budget`.
    """
    found, choices = measured_choices(
        model, tokenizer, blocks, task.budgets, config, at=task.at, dtype=settings.dtype, folder=folder,
        reporter=reporter,
    )  # fmt: skip
    if settings.recall is not None:
        far = tuple(d for d in settings.recall.distances if d < task.context - 100)
        settings = replace(settings, recall=replace(settings.recall, distances=far) if far else None)
    record = measure_frontier(
        model, tokenizer, frontier_rows(choices, task.windows, config.sinks),
        held_out[: max(1, task.eval_tokens // task.context)], out, settings=settings,
        calibrate=calibration(choices, calibration_batches(blocks), settings.element_bytes), reporter=reporter,
    )  # fmt: skip
    record |= {
        "command": "budget", "config": config.to_dict(), "sensitivity": found.to_dict(),
        "task": {name: list(x) if isinstance(x, tuple) else x for name, x in vars(task).items()},
        "choices": [{"budget": text, **choice.to_dict()} for text, choice in choices],
    }  # fmt: skip
    write_json(out / RECORD, record)
    from ..plots import quality_against_bytes

    quality_against_bytes(record, out / PICTURE)
    return record
