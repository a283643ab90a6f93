"""The verb `budget`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..config import DarkConfig, TrainConfig, field_help

DARK = DarkConfig()


def _field(name: str) -> str:
    return field_help(DarkConfig, name)


def register(app: typer.Typer, console: Console) -> None:
    """Adds `budget` to the command line."""

    @app.command()
    def budget(
        model: Annotated[str, typer.Argument(help="Hub id, folder, or .gguf file of a decoder.", metavar="MODEL")],
        out: Annotated[Path, typer.Option("--out", help="Folder of budget.json and frontier.png.")] = Path(
            "runs/budget"
        ),
        budgets: Annotated[
            list[str], typer.Option("--budget", help="Bytes a sequence may keep: 10%, 64MB or 0. Repeat.")
        ] = ["0", "5%", "10%", "20%", "30%", "50%", "100%"],  # noqa: B006 - typer copies it
        at: Annotated[int, typer.Option("--budget-at", help="Tokens it is counted at; 0: all the model reads.")] = 0,
        data: Annotated[list[str], typer.Option("--data", help="Text to choose and calibrate on. Repeat.")] = ["pydoc"],  # noqa: B006
        held_out: Annotated[
            list[str], typer.Option("--held-out", help="Text of the scores; else every eighth document of --data.")
        ] = [],  # noqa: B006
        context: Annotated[int, typer.Option("--context", help="Tokens of a sequence to choose and score at.")] = 2048,
        window: Annotated[
            list[int], typer.Option("--window", help="Row with this window and sinks alone, to compare. Repeat.")
        ] = [64, 256],  # noqa: B006
        features: Annotated[int, typer.Option("--features", help=_field("num_features"))] = DARK.num_features,
        sinks: Annotated[int, typer.Option("--sinks", help=_field("sinks"))] = DARK.sinks,
        eval_tokens: Annotated[int, typer.Option("--eval-tokens", help="Tokens of the scores.", min=2)] = 8192,
        prefill: Annotated[int, typer.Option("--prefill", help="Tokens of the timed prompt; 0 times none.")] = 8192,
        batch: Annotated[
            list[int], typer.Option("--batch", help="Sequences that generate at once after it, timed. Repeat.")
        ] = [],  # noqa: B006
        trials: Annotated[int, typer.Option("--trials", help="Recalled numbers a distance; 0: no recall.")] = 40,
        dtype: Annotated[str, typer.Option("--dtype", help=field_help(TrainConfig, "dtype"))] = "auto",
        seed: Annotated[int, typer.Option("--seed", help=_field("seed"))] = DARK.seed,
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run there and start afresh.")] = False,
    ) -> None:
        """What a number of bytes buys: loss, accuracy, recall, memory and speed at several budgets. Trains nothing.

        Measures which key/value heads need their far field, lets them keep softmax as far as each budget goes, gives
        the others a window, sinks and features, and scores all of it on held-out text. `linearize --budget` then makes
        the model. SmolLM2-135M takes some twenty minutes on two cores; --trials 0 --prefill 0 halves that.
        """
        from dataclasses import replace

        from ..console import RichReporter
        from ..evaluation.budget import PICTURE, RECORD, BudgetTask, run_budget
        from ..evaluation.frontier import RECALL, FrontierSettings
        from ..evaluation.frontier_report import frontier_notes, frontier_table

        task = BudgetTask(
            tuple(data), tuple(held_out), tuple(budgets), at or None, context, tuple(window), eval_tokens
        )  # fmt: skip
        settings = FrontierSettings(
            dtype=dtype, recall=replace(RECALL, trials=trials) if trials else None, prefill=prefill,
            batches=tuple(batch),
        )  # fmt: skip
        config = DarkConfig(num_features=features, sinks=sinks, seed=seed)
        record = run_budget(
            model, out, task, config, settings, resume=resume, overwrite=overwrite, reporter=RichReporter()
        )  # fmt: skip
        console.print(frontier_table(record))
        for note in frontier_notes(record):
            console.print(note, style="dim", markup=False)
        console.print(f"Record: {out / RECORD}   picture: {out / PICTURE}", markup=False)
