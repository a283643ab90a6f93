"""The verb `budget`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import DarkConfig
from ..console import RichReporter
from ..evaluation.settings import RECALL, BudgetTask, FrontierSettings
from .options import WITHOUT_CHOSEN, Decoder, Overwrite, Resume
from .terminal import console

Trials = Annotated[int, typer.Option("--trials", help="Recalled numbers a distance; 0: no recall.")]


def budget(
    model: Decoder,
    task: BudgetTask,
    settings: FrontierSettings,
    config: Annotated[DarkConfig, WITHOUT_CHOSEN],
    out: Annotated[Path, typer.Option("--out", help="Folder of budget.json and frontier.png.")] = Path("runs/budget"),
    trials: Trials = RECALL.trials,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """What a number of bytes buys: loss, accuracy, recall, memory and speed at several budgets. Trains nothing.

    Measures which key/value heads need their far field, lets them keep softmax as far as each budget goes, gives
    the others a window, sinks and features, and scores all of it on held-out text. `linearize --budget` then makes
    the model. SmolLM2-135M takes some twenty minutes on two cores; --trials 0 --prefill 0 halves that.
    """
    from ..evaluation.budget import PICTURE, RECORD, run_budget
    from ..evaluation.frontier_report import print_frontier

    settings = replace(settings, recall=replace(RECALL, trials=trials) if trials else None)
    record = run_budget(model, out, task, config, settings, resume=resume, overwrite=overwrite, reporter=RichReporter())
    print_frontier(record, console)
    console.print(f"Record: {out / RECORD}   picture: {out / PICTURE}")


def recipe_of(record: dict[str, Any]) -> dict[str, Any]:
    """The options that a record of `budget` was made with, but for the model, of which it has the last name only."""
    task, settings = dict(record["task"]), record["settings"]
    task.pop("model", None)
    return {
        "task": task,
        "config": record["config"],
        "settings": {name: settings[name] for name in ("dtype", "prefill", "batches")},
        "trials": settings["recall"]["trials"] if settings["recall"] else 0,
    }
