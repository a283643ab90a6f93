"""The verb `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import CONTEXT, EVALUATION_TOKENS, TrainConfig
from ..console import RichReporter
from ..evaluation.recall import RecallTask
from .options import PANELS, Data, Dtype, Model, model_folder
from .terminal import console


def _benchmark(flag: str, text: str, **options: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=PANELS["RecallTask"], **options)


def evaluate(
    model: Model,
    recall: RecallTask,
    against: Annotated[str, typer.Option("--against", help="A second model to score on the same text.")] = "",
    data: Data = ["pydoc"],  # noqa: B006 - typer copies it
    context: Annotated[
        int, typer.Option("--context", "--seq-len", help="Tokens of a scored sequence.", min=2)
    ] = CONTEXT,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens to score at most; 0 takes all there are.", min=0)
    ] = EVALUATION_TOKENS,
    whole: Annotated[bool, typer.Option("--whole", help="Score all of --data, not its held-out eighth only.")] = False,
    dtype: Dtype = TrainConfig.dtype,
    tasks: Annotated[list[str], _benchmark("--tasks", "lm-eval task, group, tag, wildcard or YAML file. Repeat.")] = [],  # noqa: B006
    include_path: Annotated[str, _benchmark("--include-path", "Folder with lm-eval tasks of your own.")] = "",
    limit: Annotated[int, _benchmark("--limit", "Documents of an lm-eval task at most; 0 takes all.", min=0)] = 0,
    passkey: Annotated[bool, _benchmark("--recall", "Passkey recall against distance. Needs no data.")] = False,
    out: Annotated[Path, _benchmark("--out", "Folder of evaluation.json and the plot.")] = Path("runs/evaluate"),
) -> None:
    """Loss, perplexity and next-token accuracy on text that linearize held out (every eighth document of --data).

    In all and by the token's position in its sequence, as tables, a plot and a record in --out. With --tasks or
    --recall: those benchmarks instead.
    """
    from ..evaluation import compare

    names = [model_folder(name) for name in ([model, against] if against else [model])]
    if tasks or passkey:
        asked = {"tasks": tasks, "include_path": include_path, "batch_size": recall.batch_size, "limit": limit}
        record = compare.benchmark(
            names, out, RichReporter(), tasks=asked if tasks else None, asked=recall if passkey else None
        )
        compare.print_benchmark(record, console)
    else:
        record = compare.text_scores(
            names, data, out, RichReporter(), context=context, dtype=dtype, max_tokens=max_tokens, whole=whole
        )
        compare.print_scores({name: row["text"] for name, row in record["models"].items()}, console, positions=True)
    console.print(f"Record: {out / compare.RECORD}")
