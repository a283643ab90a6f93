"""`darkformer evaluate`: held-out text, lm-eval tasks and passkey recall, for one model or two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import TrainConfig
from ..hf.convert import dark_layers
from ..hf.load import load_model, load_tokenizer
from ..train.data import load_documents, token_blocks
from ..train.linearize import load_text, scored
from ..train.record import environment, write_json
from ..train.report import Reporter
from .recall import RecallTask, recall

#: What `evaluate` writes into its output folder.
RECORD, RECALL_PLOT = "evaluation.json", "recall.png"


def text_scores(
    names: Sequence[str], data: Sequence[str], budget: TrainConfig, reporter: Reporter, *, max_tokens: int, whole: bool
) -> dict[str, dict[str, Any]]:
    """Loss, perplexity and accuracy of each model on the held-out part of `data`, or on all of it (`whole`)."""
    scores = {}
    for name in names:
        title = Path(name).name
        with reporter.stage(f"{title}: load text and model", 1):
            tokenizer, model = load_tokenizer(name), load_model(name)
            if whole:
                blocks = token_blocks(tokenizer, load_documents(data), budget.seq_len)
            else:
                _, blocks = load_text(data, (), tokenizer, budget.seq_len)
        blocks = blocks[: max(1, max_tokens // budget.seq_len)] if max_tokens else blocks
        scores[name] = scored(model, blocks, budget, reporter, title)
    return scores


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
    if tasks:  # before a model is loaded
        from .harness import run_tasks
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        title = Path(name).name
        with reporter.stage(f"{title}: load", 1):
            model, tokenizer = load_model(name), load_tokenizer(name)
        first = next(dark_layers(model), None)
        row: dict[str, Any] = {"window": None if first is None else first.config.window}
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
    shown: dict[str, list[str]] = {}
    for row in models.values():
        for task, metrics in row.get("tasks", {}).items():
            for metric, value in metrics.items():
                if "_stderr" not in metric:
                    shown.setdefault(f"{task} {metric.split(',')[0]}", []).append(f"{value:.4f}")
        for point in row.get("recall", []):
            shown.setdefault(f"recall at {point['distance']} tokens", []).append(f"{point['accuracy']:.0%}")
    for label, cells in shown.items():
        table.add_row(label, *cells)
    console.print(table)
