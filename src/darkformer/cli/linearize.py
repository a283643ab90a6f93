"""The verb `linearize`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import CONTEXT, NO_BUDGET, USUAL_BUDGET, DarkConfig, TrainConfig, field_help
from ..console import RichReporter
from ..errors import ConfigError
from ..evaluation.settings import BudgetTask
from .options import Context, Data, Decoder, HeldOut, Overwrite, Resume, RunFolder, budget_beside
from .terminal import console

Paper = Annotated[
    bool,
    typer.Option(
        "--paper",
        help="The paper's exact form: window 0, sinks 0, no change of variables, M from the identity. Beside it "
        "--method, --features, --draw, --convert-sliding and --keep-exact can be chosen.",
        rich_help_panel="Attention",
    ),
]
MemoryBudget = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Bytes one sequence may keep: a share of the softmax cache (10%), a size (64MB), or 0 for constant state. "
        "Which heads keep softmax, and the windows of the others, are chosen to lose least; --window does not count "
        "then. none: heads and windows as the other options say. usual: 10% where that is possible, and none beside "
        "--paper, --method, --window, --keep-exact, --no-features or --layer-window.",
        rich_help_panel="Attention",
    ),
]
BudgetAt = Annotated[
    int, typer.Option("--budget-at", help=field_help(BudgetTask, "at"), min=0, rich_help_panel="Attention")
]
WithFrontier = Annotated[
    bool,
    typer.Option(
        "--frontier/--no-frontier",
        help="With --budget, but for the usual one: measure and print other budgets first.",
        rich_help_panel="Attention",
    ),
]


def linearize(
    options: typer.Context,
    model: Decoder,
    out: RunFolder,
    config: DarkConfig,
    train: TrainConfig,
    data: Data = ["pydoc"],  # noqa: B006 - typer copies it
    held_out: HeldOut = [],  # noqa: B006
    paper: Paper = False,
    budget: MemoryBudget = USUAL_BUDGET,
    budget_at: BudgetAt = 0,
    frontier: WithFrontier = True,
    context: Context = CONTEXT,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Replace a decoder's softmax attention by linear attention: convert, calibrate, finetune, save.

    Examples: darkformer linearize HuggingFaceTB/SmolLM2-135M --data 'books/*.txt' --steps 500 --out runs/smol

    darkformer linearize model.gguf --data 'books/*.txt' --budget 20% --steps 0 --out runs/fifth
    """
    from ..evaluation.compare import print_scores
    from ..train.linearize import linearize as run

    budget = budget_beside(options, budget)
    if paper and budget != NO_BUDGET:
        raise ConfigError("--paper with --budget: the paper's form has no exact part that a budget could choose.")
    if paper:
        config = _paper(config)

    def measure_other_budgets(model: Any, tokenizer: Any, blocks: Any, validation: Any, out: Path) -> dict[str, Any]:
        from ..evaluation.budget import PICTURE, measure_budgets, with_budget
        from ..evaluation.frontier_report import print_frontier
        from ..evaluation.settings import FrontierSettings

        settings = FrontierSettings(dtype=train.dtype)
        task = BudgetTask(at=budget_at or None, context=context)
        task = replace(task, budgets=with_budget(task.budgets, budget, model, task.at, train.dtype))
        record = measure_budgets(
            model, tokenizer, blocks, validation, out / "frontier", task, config, settings, folder=out / "sensitivity",
            reporter=RichReporter(),
        )  # fmt: skip
        print_frontier(record, console)
        console.print(f"Picture: {out / 'frontier' / PICTURE}")
        return record

    asked = budget not in (USUAL_BUDGET, NO_BUDGET)
    record = run(
        model, out, data=data, held_out=held_out, config=config, training=train, context=context, budget=budget,
        budget_at=budget_at or None, measure_frontier=measure_other_budgets if frontier and asked else None,
        resume=resume, overwrite=overwrite, reporter=RichReporter(),
    )  # fmt: skip
    print_scores(record["scores"], console)
    console.print(f"The model is in {out / 'model'}: darkformer generate {out} --prompt '…'")


def _paper(config: DarkConfig) -> DarkConfig:
    """The paper's form with what may be chosen in it; says what else was asked for and does not count."""
    form = DarkConfig.paper(
        config.num_features, method=config.method, draw=config.draw, seed=config.seed,
        convert_sliding=config.convert_sliding, keep_exact=config.keep_exact,
    )  # fmt: skip
    usual, asked, papers = DarkConfig().to_dict(), config.to_dict(), form.to_dict()
    if others := [name for name, value in asked.items() if value not in (usual[name], papers[name])]:
        said = ", ".join(f"{name}={asked[name]} (the paper's: {papers[name]})" for name in others)
        console.print(f"Not used beside --paper: {said}.", style="yellow")
    return form


def recipe_of(record: dict[str, Any]) -> dict[str, Any]:
    """The options that a record of `linearize` was made with; the folder is the caller's own."""
    options = {name: record[name] for name in ("model", "data", "held_out", "config")}
    options |= {"train": record["budget"], "context": record.get("context")}  # earlier versions had no context
    if record.get("memory"):
        options |= {"budget_at": record["memory_at"], "frontier": bool(record["frontier"])}
    return options | {"budget": record.get("memory") or NO_BUDGET}
