"""`darkformer evaluate`: held-out text, lm-eval tasks and passkey recall, for one model or two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..config import CONTEXT, EVALUATION_TOKENS, TrainConfig
from ..hf.layers import config_of, dark_layers
from ..hf.load import load_model, load_tokenizer
from ..records import check_folder, environment, write_json
from ..reporting import Reporter
from ..train.data import load_documents, split_documents, token_blocks
from ..train.linearize import check_context, scored
from .recall import RecallTask, recall

#: What `evaluate` writes into its output folder.
RECORD, RECALL_PLOT, POSITION_PLOT = "evaluation.json", "recall.png", "loss-by-position.png"


def text_blocks(tokenizer: Any, data: Sequence[str], context: int, *, whole: bool) -> Tensor:
    """Blocks (N, context) of the held-out part of `data`, or of all of it (`whole`).

    Raises:
        InputError: the text is shorter than the context.
    """
    documents = load_documents(data)
    if whole:
        return token_blocks(tokenizer, documents, context, "the", "give more text or a smaller --context")
    held_out = split_documents(documents)[1]
    advice = "give more text, --whole to score all of --data, or a smaller --context"
    return token_blocks(tokenizer, held_out, context, "the held-out", advice)


def text_scores(
    names: Sequence[str], data: Sequence[str], out: Path, reporter: Reporter, *, context: int = CONTEXT,
    dtype: str = "auto", max_tokens: int = EVALUATION_TOKENS, whole: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Loss, perplexity and accuracy of each model, by position too; writes `evaluation.json` and a plot into `out`.

    Args:
        context: tokens of a sequence. max_tokens: of all sequences, at least one of which is scored; 0: all there are.
        whole: score all of `data`, not its held-out part.

    Returns:
        The record: model → `text` (as `Score.to_dict`) and `window` (None for softmax).

    Raises:
        InputError: the text is shorter than the context. ConfigError: no such dtype, or a context of one token.
    """
    check_folder(out)
    training = TrainConfig(seq_len=context, dtype=dtype)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        title = Path(name).name
        with reporter.stage(f"{title}: load text and model", 1):
            tokenizer, model = load_tokenizer(name), load_model(name)
            check_context(model.config, context)
            blocks = text_blocks(tokenizer, data, context, whole=whole)
        blocks = blocks[: max(1, max_tokens // context)] if max_tokens else blocks
        rows[name] = {"window": _window(model), "text": scored(model, blocks, training.dtype, reporter, title)}
    record = {
        "command": "evaluate", "models": rows, "data": list(data), "whole": whole, "context": context,
        "dtype": training.dtype, "environment": environment(),
    }  # fmt: skip
    write_json(out / RECORD, record)
    from ..plots import loss_by_position

    loss_by_position({name: row["text"]["by_position"] for name, row in rows.items()}, out / POSITION_PLOT)
    return record


def _window(model: Any) -> int | None:
    first = next(dark_layers(model), None)
    return None if first is None else config_of(model).window


def print_scores(scores: Mapping[str, Mapping[str, Any]], console: Console, *, positions: bool = False) -> None:
    """Loss, perplexity and accuracy of each row; with `positions` a second table by the token's position."""
    table = Table()
    for column in ("", "loss", "perplexity", "accuracy", "tokens"):
        table.add_column(column, justify="left" if not column else "right")
    for name, score in scores.items():
        cells = (f"{score['loss']:.4f}", f"{score['perplexity']:.2f}", f"{score['accuracy']:.2%}", str(score["tokens"]))
        table.add_row(name, *cells)
    console.print(table)
    if not positions:
        return
    table = Table(title="by position: loss, accuracy")
    table.add_column("tokens", justify="right")
    for name in scores:
        table.add_column(name, justify="right")
    for buckets in zip(*(score["by_position"] for score in scores.values()), strict=True):
        shown = [f"{bucket['loss']:.4f}  {bucket['accuracy']:.1%}" for bucket in buckets]
        table.add_row(f"{buckets[0]['start']:,}-{buckets[0]['stop'] - 1:,}", *shown)
    console.print(table)


def benchmark(
    names: Sequence[str], out: Path, reporter: Reporter, *, tasks: Mapping[str, Any] | None, asked: RecallTask | None
) -> dict[str, Any]:
    """lm-eval tasks and passkey recall of each model; writes `evaluation.json` and `recall.png` into `out`.

    Args:
        tasks: keyword arguments of `run_tasks`, or None. asked: the recall task, or None.

    Returns:
        The record: model → `tasks` (task → metric → value), `recall` (points), `window` (None for softmax).

    Raises:
        MissingExtraError: tasks without lm-eval. InputError: see `run_tasks`.
    """
    check_folder(out)
    if tasks:  # before a model is loaded
        from .tasks import run_tasks
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        title = Path(name).name
        with reporter.stage(f"{title}: load", 1):
            model, tokenizer = load_model(name), load_tokenizer(name)
        row: dict[str, Any] = {"window": _window(model)}
        if tasks:
            reporter.say(f"{title}: lm-eval tasks")  # it draws bars of its own
            row["tasks"] = run_tasks(model, tokenizer, **tasks)
        if asked:
            with reporter.stage(f"{title}: recall", len(asked.distances)) as advance:
                row["recall"] = recall(model, tokenizer, asked, progress=advance)
        rows[name] = row
    record = {
        "command": "evaluate", "models": rows, "recall_task": asdict(asked) if asked else None,
        "tasks": dict(tasks) if tasks else None, "environment": environment(),
    }  # fmt: skip
    write_json(out / RECORD, record)
    if asked:
        from ..plots import recall_against_distance

        recall_against_distance(rows, out / RECALL_PLOT)
    return record


def print_benchmark(record: Mapping[str, Any], console: Console) -> None:
    """The record as tables: one row a metric or distance, one column a model."""
    models = record["models"]
    table = Table()
    for name in ("", *models):
        table.add_column(name, justify="left" if not name else "right")
    shown: dict[str, dict[str, str]] = {}  # by row and model: not every model has a number in every row
    for name, row in models.items():
        for task, metrics in row.get("tasks", {}).items():
            for metric, value in metrics.items():
                if "_stderr" not in metric:
                    shown.setdefault(f"{task} {metric.split(',')[0]}", {})[name] = f"{value:.4f}"
        for point in row.get("recall", []):
            shown.setdefault(f"recall at {point['distance']} tokens", {})[name] = f"{point['accuracy']:.0%}"
    for label, cells in shown.items():
        table.add_row(label, *(cells.get(name, "") for name in models))
    console.print(table)
